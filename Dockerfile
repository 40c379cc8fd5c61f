# docker build -t atelier . && docker run --rm -it --gpus all --shm-size=8g --user "$(id -u):$(id -g)" \
#     -v PATH:/images:ro -v "$PWD/outputs:/atelier/outputs" atelier python train.py data.root=/images loop.minutes=10
# PyTorch's wheels bring CUDA; the host needs NVIDIA's driver and container toolkit, or neither: without --gpus, the CPU.
FROM python:3.14-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /atelier
COPY requirements*.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-sdxl.txt -r requirements-view.txt -r requirements-formats.txt
COPY . .
# Any user may run it: libraries keep their caches below HOME.
ENV HOME=/tmp
CMD ["python", "train.py", "--help"]

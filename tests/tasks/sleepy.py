"""Fine-tuning whose rank 1 falls asleep before the data of its fourth step: for the test of the watchdog."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data.loader
import finetune
from utils.ranks import distributed

_steps = data.loader.TrainStream.steps


def steps(self, start_step, plan):
    for number, step in enumerate(_steps(self, start_step, plan), start_step):
        if number == 3 and distributed.rank() == 1:
            time.sleep(3600)
        yield step


data.loader.TrainStream.steps = steps

if __name__ == "__main__":
    finetune.main()

"""job=audit of evaluate.py: repeat segments of a run, or find weights or an image in its chain."""

import random
from pathlib import Path
from typing import Any, Literal

from data.images.merkle import check, list_leaves, prove
from data.open import load_collection
from engine.audit.chain import AUDIT_FILE, FIRST, KEPT, head_of, read_chain
from engine.audit.replay import repeat
from engine.judging.measured import choose_images
from engine.task import IMAGE_HASHES
from utils.config.bounds import Count
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.io.files import read_json, readable, sha256_file, write_json
from utils.io.weights import hash_tensors, read_weights


class Audit(Strict):
    """Repeat segments of a run, `verify` of them; or find weights or an image, by its proof, in its chain."""

    name: Literal["audit"]
    run_dir: PathText
    verify: Count
    weights: PathText | None
    source: PathText | None

    def run(self, config: Any, runtime: Any) -> str:
        """Return the verdict. A chain alone is enough to find weights, and an image that has a proof."""
        run = Path(self.run_dir)
        links = read_chain(run)
        if len(links) < 2 or links[0]["checkpoint"] != FIRST:
            raise UserError("run_dir: it has no chain of two links from step 0 on; train with loop.audit_every=500")
        if self.weights is not None:
            digest = hash_tensors(read_weights(Path(self.weights))[0])
            found = [link["checkpoint"] for link in links if digest in link["hashes"]]
            if not found:
                raise UserError("weights: they are those of no link in the chain; ask for the chain of their run")
            return f"the weights of {found[0]}, in the chain with the head {head_of(links)}"
        if self.source is not None:
            image = sha256_file(Path(self.source))
            proof = Path(f"{self.source}.proof.json")
            if not proof.is_file():
                collection = load_collection(choose_images(config.data, self.run_dir, "train").data)
                write_json(proof, prove(list_leaves(collection, IMAGE_HASHES), image))
            rows = check(read_json(proof), image, links[-1]["data"]["data.images"])
            return f"rows of the image in the collection: {rows or 'none'}"
        moved = [] if config.data is None else [f"data.root={config.data.root}", "resume_allow=[data.root]"]
        segments = list(zip(links, links[1:]))
        drawn = random.SystemRandom().sample(segments, min(self.verify, len(segments)))
        with about("run_dir"), readable(run / KEPT, "checkpoint"):
            shown = "; ".join(repeat(run, *segment, ["data.cache.disk_gib=0", *moved]) for segment in drawn)
        missed = f"{1 - len(drawn) / len(segments):.2g} is the chance to have missed a forged one"
        said = f"{len(drawn)} of {len(segments)} segments: {shown}; {missed}"
        write_json(run / AUDIT_FILE, {"chain": head_of(links), "repeated": said})
        return said

"""Files of prompts: the options of sd-scripts and the web UIs, comments, lists, and what is wrong in them."""

import pytest

from sdxl.config import Prompt
from sdxl.pictures.prompts import read_prompt_file, spell_prompt
from tests.support import refuses

LINES = b"""# prompts for the samples\r
\r
a cat on a chair --n low quality, blurry --w 96 --h 70 --d 7 --l 7.5 --s 4\r
  # another
a dog -- seen -d from afar --w 64
--prompt "two cats" --negative_prompt "grey" --steps 3 --cfg_scale 2 --seed -1
a bird --ss euler_a --s 9 --n\t
a half-timbered house, 10--20 people
"""


def test_options_of_sd_scripts_and_the_web_uis_are_read(tmp_path, log):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + LINES)
    assert read_prompt_file(str(file), (512, 256)) == [
        Prompt(
            text="a cat on a chair",
            negative="low quality, blurry",
            image_size_hw=[64, 96],
            seed=7,
            guidance=7.5,
            steps=4,
        ),
        Prompt(text="a dog -- seen -d from afar", image_size_hw=[512, 64]),
        Prompt(text="two cats", negative="grey", steps=3, guidance=2.0),
        Prompt(text="a bird", steps=9, negative=""),
        "a half-timbered house, 10--20 people",
    ]
    assert "prompts: " in log.text and "not read: ss;" in log.text


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.toml", "[prompt]\nwidth = 64\nscale = 5\n[[prompt.subset]]\nprompt = 'a'\nsample_steps = 2\nseed = -1"),
        ("p.json", '[{"prompt": "a", "width": 64, "scale": 5, "sample_steps": 2, "seed": -1}]'),
    ],
)
def test_lists_of_sd_scripts_are_read(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    wanted = [Prompt(text="a", image_size_hw=[32, 64], guidance=5.0, steps=2)]
    assert read_prompt_file(str(tmp_path / name), (32, 32)) == wanted


@pytest.mark.parametrize(
    "text, said",
    [
        ("a\nb --s many", "prompts.1.steps: must be a valid integer, found 'many'"),
        ("a --w 96 --h x", "prompts.0.image_size_hw.0: "),
        ("a --d -7", "prompts.0.seed: "),
        ("a --s", "prompts.0.steps: "),
        ("# nothing", "prompts: "),
    ],
)
def test_what_is_wrong_is_named_by_the_key_and_the_number_of_the_prompt(text, said, tmp_path):
    (tmp_path / "prompts.txt").write_text(text)
    with refuses(said):
        read_prompt_file(str(tmp_path / "prompts.txt"), (64, 64))
    with refuses(said.replace("prompts", "task.samples.prompts", 1)):
        read_prompt_file(str(tmp_path / "prompts.txt"), (64, 64), "task.samples.prompts")


@pytest.mark.parametrize(
    "text, emphasis, spelled",
    [
        (r"a [cat:dog:0.5] :( {b} AND x\y", False, r"a \[cat:dog:0.5\] :\( \{b\} and x\\y"),
        ("a ((cat)) :( {b} BREAK c", True, r"a (cat:1.21) :\( (b:1.2) BREAK c"),  # {} is text there, ( weighs the rest
    ],
)
def test_a_web_ui_reads_no_command_in_a_spelled_prompt(text, emphasis, spelled):
    assert spell_prompt(text, emphasis) == spelled

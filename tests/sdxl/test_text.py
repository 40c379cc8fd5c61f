"""SDXL's texts: ids and encoders equal open_clip's, on random weights; sizes equal diffusers'."""

import pytest
import torch

pytest.importorskip("diffusers", reason="make install-sdxl")

import open_clip
from open_clip.transformer import TextTransformer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl.files import tokenizer
from sdxl.files.family import PREFIXES
from sdxl.files.names import part_state, to_single_file
from sdxl.files.tokenizer import BOS, EOT, build_tokenizer, count_chunks, pad_second, tokenize
from sdxl.step import encode_text
from utils.errors import find_lack

WRITTEN = [
    "", " ", "a photo of a cat", "1girl, solo, long_hair, looking at viewer", "!!! wow!! !", "hatsune_miku (vocaloid)",
    "café naïve ÅNGSTRÖM", "cafe\u0301", "猫と犬、初音ミク", "🐱👩‍👩‍👧 🇯🇵", "tabs\tand\n\nlines  ", "it's they'RE I'll",
    "x" * 300, "word " * 100, "12,345.67 a1b2", "&lt;b&gt; &amp;amp; &quot;q&quot;", "“curly” ‘quotes’ ﬁne", "İstanbul",
    "<|startoftext|> a <|ENDOFTEXT|>", "schÃ¶n", "^_^ >_< :d \\(x\\)", "ſ 's", "\u200bzero\u00a0width",
]  # fmt: skip


def test_ids_equal_those_of_open_clip():
    assert pad_second(tokenize(WRITTEN, 1)[0][:, 0]).equal(open_clip.tokenize(WRITTEN))


def test_chunks_go_on_where_the_last_ends():
    long = " ".join(f"{number % 7}" for number in range(160))
    ids = tokenize([long, "a"], 3)[0]
    assert ids.shape == (2, 3, 77) and ids.dtype == torch.int64
    assert (ids[..., 0] == BOS).all() and (ids[..., -1] == EOT).all()
    words = tokenize([long], 4)[0][0, :, 1:-1].flatten()
    assert ids[0, :, 1:-1].flatten().equal(words[:225]) and (words[160:] == EOT).all() and (words[:160] != EOT).all()
    assert (ids[1, 1:, 1:] == EOT).all() and tokenize([long], 1)[0][0].equal(ids[0, :1])
    assert [count_chunks(text) for text in ("", "1 " * 75, "1 " * 76, long, "x" * 1000)] == [1, 1, 2, 3, 4]


def test_a_word_is_not_divided_between_chunks_unless_it_is_long():
    """As ComfyUI fills them."""
    ids = tokenize(["1 " * 73 + "12345 1", "1 " * 73 + "123456789"], 2)[0]
    assert (ids != EOT).sum(dim=2).tolist() == [[74, 7], [76, 8]]


def test_an_absent_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        build_tokenizer()
    assert "make install-sdxl" in find_lack(raised.value)


# The encoders.


def make_encoder(kind, width):
    torch.manual_seed(width)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=4, num_hidden_layers=3, projection_dim=24,
        hidden_act="gelu", vocab_size=49_408, eos_token_id=EOT,
    )  # fmt: skip
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def to_open_clip(part, model, width):
    """Return open_clip's tower with a transformers encoder's weights, as a single file has them."""
    theirs = TextTransformer(width=width, heads=4, layers=3, output_dim=24).eval()
    state = {"text_projection.weight": torch.zeros(24, width), **part_state(part, model)}
    single = to_single_file("text_encoder_2", state)
    prefix = PREFIXES["text_encoder_2"]
    theirs.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in single.items()})
    return theirs


@torch.no_grad()
def test_embeddings_equal_those_of_open_clip():
    first, second = make_encoder(CLIPTextModel, 32), make_encoder(CLIPTextModelWithProjection, 48)
    ids = tokenize(["a cat, outdoors, " * 30, "", "1girl"], 2)[0]
    embeds, pooled = encode_text(first, second, ids)
    assert embeds.shape == (3, 154, 80) and pooled.shape == (3, 24)
    assert embeds.any(dim=-1).sum(dim=1).tolist() == [154, 77, 77]
    with_zeros = pad_second(ids)
    towers = to_open_clip("text_encoder", first, 32), to_open_clip("text_encoder_2", second, 48)
    for chunk in range(2):
        used = slice(None) if chunk == 0 else slice(1)  # the second chunk has words of the first caption alone
        part = embeds[used, 77 * chunk : 77 * (chunk + 1)]
        theirs = towers[0].forward_intermediates(ids[used, chunk], output_fmt="NLC")
        torch.testing.assert_close(part[..., :32], theirs["text_intermediates"][-2], atol=1e-4, rtol=1e-4)
        theirs = towers[1].forward_intermediates(with_zeros[used, chunk], output_fmt="NLC")
        torch.testing.assert_close(part[..., 32:], theirs["text_intermediates"][-2], atol=1e-4, rtol=1e-4)
        if chunk == 0:
            torch.testing.assert_close(pooled, theirs["text_features"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_emphasis_moves_a_tokens_output_away_from_the_empty_text():
    """As ComfyUI does it; a caption without emphasis is encoded as before."""
    encoders = make_encoder(CLIPTextModel, 32), make_encoder(CLIPTextModelWithProjection, 48)
    captions = ["a (cat:1.5), [on] BREAK BREAK ({mat})", "a dog", "(word:0.5) " * 100]
    ids, weights = tokenize(captions, 2, emphasis=True)
    assert [count_chunks(text, emphasis=True) for text in captions] == [2, 1, 2]
    assert ids[0].equal(tokenize(["a cat, on", "mat"], 1)[0][:, 0])
    assert ids[1:].equal(tokenize(["a dog", "word " * 100], 2)[0])
    wanted = torch.ones(3, 2, 77)
    wanted[0, 0, 2], wanted[0, 0, 4], wanted[0, 1, 1] = 1.5, 1 / 1.1, 1.32
    wanted[2, 0, 1:76] = wanted[2, 1, 1:26] = 0.5
    torch.testing.assert_close(weights, wanted)
    plain, pooled = encode_text(*encoders, ids)
    empty = encode_text(*encoders, tokenize([""], 1)[0])[0].repeat(1, 2, 1)
    embeds, same = encode_text(*encoders, ids, weights)
    torch.testing.assert_close(embeds, empty + wanted.view(3, 154, 1) * (plain - empty), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, pooled, rtol=1e-5, atol=1e-5)
    assert tokenize(captions, 2, emphasis=False)[1] is None and count_chunks(captions[2]) == 10

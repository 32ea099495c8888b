"""bench/lora.py: what it compares trains, and noise that is written into a bf16 base leaves other weights behind."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers

from bench import lora

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def tiny() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=16))


TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


def test_every_way_trains_the_adapters_alone_and_is_in_the_table():
    costs = lora.measure(tiny, TOKENS, rounds=1)
    assert costs[lora.PLAIN].ratio == 1.0
    assert costs[lora.PLAIN].more == 0
    lines = lora.format_table(costs).splitlines()
    assert [line[:30].strip() for line in lines[1:]] == list(lora.WAYS)


@pytest.mark.parametrize("way", lora.WAYS)
def test_step_changes_adapters(way):
    model = lora.adapted(tiny)
    step = lora.WAYS[way](model)
    before = {name: p.detach().clone() for name, p in lora.trained(model)}
    step(TOKENS)
    step(TOKENS)
    assert all(not torch.equal(p, before[name]) for name, p in lora.trained(model) if "lora_B" in name)


def test_noise_that_is_written_leaves_other_weights_behind_and_ours_does_not():
    shares = [lora.changed(tiny, lora.WAYS[way], TOKENS, 5) for way in (lora.FLAT, lora.WRITTEN)]
    assert shares[0] == 0.0
    assert shares[1] > 0.01


def test_page_quotes_the_committed_results():
    page = (lora.RESULTS.parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    assert f"```\n{lora.RESULTS.read_text(encoding='utf-8')}```" in page

"""serve-bench: what it asks of vLLM, what it makes of the answers, and one small run where vLLM is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fdk
from fdk.bench import serve
from fdk.bench.plots import PlotError

ANSWERS = {
    "throughput": {"elapsed_time": 2.0, "num_requests": 128, "total_num_tokens": 20480},
    "latency": {"avg_latency": 0.5, "percentiles": {str(q): 0.5 + q / 1000 for q in (10, 25, 50, 75, 90, 99)}},
}


def folder(path: Path, **config) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    commands = []

    def answer(arguments, timeout):
        commands.append(list(arguments))
        if "int4_g128" in " ".join(arguments):
            return {"status": "failed", "reason": "exit status 1: no"}
        return {"status": "ok", **ANSWERS[arguments[0]]}

    monkeypatch.setattr(serve, "measure", answer)
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    return commands


def test_formats_are_measured_with_the_settings_of_the_source(tmp_path, asked, capsys) -> None:
    dense = folder(tmp_path / "dense")
    nested = folder(tmp_path / "nested", quantization_config={"quant_method": "fdk"})
    arguments = [str(dense), str(nested), "--formats", "16", "int4_g128", "--output-dir", str(tmp_path)]
    assert serve.main([*arguments, "--", "--tensor-parallel-size", "2"]) == 1
    assert len(asked) == 3 * (1 + 5)
    first, second = asked[:2]
    assert first[0] == "throughput" and first[-2:] == ["--num-prompts", "128"]
    assert first[3:9] == ["--random-input-len", "32", "--random-output-len", "128", "--tensor-parallel-size", "2"]
    assert second[0] == "latency" and second[3:7] == ["--input-len", "32", "--output-len", "128"]
    assert second[9:11] == ["--batch-size", "1"]
    assert [c[c.index("--batch-size") + 1] for c in asked[1:6]] == ["1", "2", "4", "8", "16"]
    assert asked[6][7:11] == ["--quantization", "fdk", "--additional-config", '{"fdk": {"format": "int4_g128"}}']
    assert "--quantization" not in asked[12]
    entries = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert [entry["format"] for entry in entries[::6]] == ["16", "int4_g128", "fdk folder"]
    assert entries[0]["tokens_per_second"] == 10240 and entries[1]["time_p50"] == 0.55 and entries[1]["m"] == 1
    assert entries[6]["status"] == "failed" and entries[6]["reason"] == "exit status 1: no"
    assert "failed: exit status 1: no" in capsys.readouterr().out
    assert next(tmp_path.glob("*.svg")).stat().st_size


def test_what_cannot_run_is_said_first(tmp_path, monkeypatch) -> None:
    with pytest.raises(fdk.FormatError, match="does not exist"):
        serve.variants([str(tmp_path / "nothing" / "here" / "x")], ["16"])
    with pytest.raises(fdk.FormatError, match="hexa"):
        serve.variants([str(folder(tmp_path / "dense"))], ["hexa4_g32"])
    with pytest.raises(PlotError, match="no engine"):
        serve.draw([{"status": "failed"}], tmp_path / "x.svg")
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(fdk.FdkError, match="vLLM, which is not installed"):
        serve.main([str(tmp_path / "dense")])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` sets it up")
def test_a_small_model_through_vllm(tmp_path, monkeypatch) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(9999)} | {"[UNK]": 9999}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The latency benchmark draws tokens below 10000.
    config = transformers.LlamaConfig(
        vocab_size=10000, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        tmp_path / "model"
    )
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = [str(tmp_path / "model"), "--formats", "lut4_g32", "--prompts", "4", "--batch-sizes", "1"]
    arguments += ["--input-len", "8", "--output-len", "8", "--iterations", "2", "--output-dir", str(tmp_path)]
    status = serve.main([*arguments, "--", "--enforce-eager", "--dtype", "float32", "--max-model-len", "64"])
    text = next(tmp_path.glob("*.jsonl")).read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    assert status == 0, text
    assert [entry["test"] for entry in entries] == ["serve_throughput", "serve_latency"]
    assert all(entry.get("tokens_per_second", 1) > 0 and entry.get("time_p50", 1) > 0 for entry in entries)

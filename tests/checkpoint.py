"""Tiny random models of transformers in folders, each with a tokenizer, as somebody would have saved them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 320
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 256},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 256, "word_embed_proj_dim": 64},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "max_position_embeddings": 256},
    "gemma3_text": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 64},
}  # fmt: skip


LIKE_LLAMA = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}  # fmt: skip
EVERY = {  # of the architectures that anatomy knows
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "gemma2"), LIKE_LLAMA),
    "gpt_oss": LIKE_LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1},
    **SHAPES,
}


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens at most, <s> being 0 and </s> 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model_of(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a kind of EVERY."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **EVERY[kind] | settings | changes)).eval()


def folder_of(kind: str, folder: Path, texts: Sequence[str], seed: int = 0, **changes: Any) -> Path:
    """The folder of such a model and its tokenizer, trained on the texts."""
    model_of(kind, seed, **changes).save_pretrained(folder)
    tokenizer_of(texts).save_pretrained(folder)
    return folder


def gguf_of(path: Path, texts: Sequence[str], bos: int | None = 0, without: str = "", **keys: str) -> Path:
    """A GGUF file of a random Llama of two layers; without one tensor, and with further keys of text."""
    import gguf
    import numpy as np

    tokenizer = tokenizer_of(texts)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, size in {"context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 64,
                       "attention.head_count": 4, "attention.head_count_kv": 4, "rope.dimension_count": 16,
                       "vocab_size": len(tokens)}.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if bos is not None:
        writer.add_bos_token_id(bos)
    for name, text in keys.items():
        writer.add_string(name, text)
    shapes = {"token_embd": (len(tokens), 64), "output": (len(tokens), 64), "output_norm": (64,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}_norm": (64,) for name in ("attn", "ffn")}
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{layer}.{name}": (64, 64) for name in names}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != without:
            weight = draw.normal(1.0 if len(shape) == 1 else 0.0, 0.05, shape)
            writer.add_tensor(f"{name}.weight", weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""llama.cpp, through the functions of its C library that llama-cpp-python declares.

Its GELU comes from a table of 16 bits, so its float32 is not exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from workloads import NEW, Model, Workload

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}  # of the matrices


def prepare_llama(model: Model, folder: Path, calibration: list[Workload]) -> None:
    import gguf
    import transformers

    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder / model.name)
    config, work = loaded.config, folder / "llama.cpp" / model.name
    work.mkdir(parents=True, exist_ok=True)
    for precision, kind in TYPES.items():
        writer = gguf.GGUFWriter(work / f"{precision}.gguf", "gpt2")
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        for name, x in tensors(loaded):
            is_matrix = x.ndim == 2 and name != "position_embd.weight"
            dtype = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(x, dtype), raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def tensors(loaded) -> Iterator[tuple[str, np.ndarray]]:
    """Of a GPT2LMHeadModel, float32, matrices (out_features, in_features), by the names of llama.cpp."""
    model = loaded.transformer
    named = {"token_embd": model.wte, "position_embd": model.wpe, "output_norm": model.ln_f}
    for i, block in enumerate(model.h):
        parts = {
            "attn_norm": block.ln_1, "attn_qkv": block.attn.c_attn, "attn_output": block.attn.c_proj,
            "ffn_norm": block.ln_2, "ffn_up": block.mlp.c_fc, "ffn_down": block.mlp.c_proj,
        }  # fmt: skip
        named |= {f"blk.{i}.{name}": part for name, part in parts.items()}
    for name, part in named.items():
        for kind, parameter in part.named_parameters():
            x = parameter.detach().float()
            is_transposed = type(part).__name__ == "Conv1D" and x.ndim == 2
            yield f"{name}.{kind}", np.ascontiguousarray((x.T if is_transposed else x).numpy())


def load_llama(model: Model, folder: Path, threads: int, precision: str) -> Callable[[Workload], np.ndarray]:
    import llama_cpp as c

    c.llama_log_set(_silent, None)
    c.llama_backend_init()
    path = folder / "llama.cpp" / model.name / f"{precision}.gguf"
    parameters = c.llama_model_default_params()
    parameters.use_extra_bufts = precision != "int8"  # its AMX code for Q8_0 crashes on 50,257 columns
    loaded = c.llama_model_load_from_file(str(path).encode(), parameters)
    if not loaded:
        raise RuntimeError(f"llama.cpp can't load {path}")
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(loaded))
    contexts: dict[str, Context] = {}  # by workload

    def run(workload: Workload) -> np.ndarray:
        batch, length = workload.ids.shape
        if workload.name not in contexts:
            room = length + (NEW if workload.task == "generate" else 0)
            contexts[workload.name] = Context(c, loaded, vocabulary, batch, room, threads, precision)
            if workload.task == "token":
                contexts[workload.name].decode(workload.ids[:, :-1], 0)
        context = contexts[workload.name]
        if workload.task == "token":
            context.forget(length - 1)
            return context.decode(workload.ids[:, -1:], length - 1)
        context.forget(0)
        logits = context.decode(workload.ids, 0)
        if workload.task == "prefill":
            return logits
        tokens = [logits.argmax(1)]
        for position in range(length, length + NEW - 1):
            tokens.append(context.decode(tokens[-1][:, None], position).argmax(1))
        return np.stack(tokens, 1)

    return run


class Context:
    """Sequences side by side, and their keys and values."""

    def __init__(self, c, model, vocabulary: int, sequences: int, room: int, threads: int, precision: str):
        parameters = c.llama_context_default_params()
        parameters.n_ctx = -(-room // 256) * 256 * sequences
        parameters.n_batch = parameters.n_ubatch = max(512, sequences * room)
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        if precision == "float32":  # else 16 bits, its default
            parameters.type_k = parameters.type_v = c.GGML_TYPE_F32
        self.c, self.vocabulary, self.sequences = c, vocabulary, sequences
        self.context = c.llama_init_from_model(model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp can't make a context")
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(sequences * room, 0, 1)

    def forget(self, position: int) -> None:
        """All that stands there or behind."""
        for sequence in range(self.sequences):
            self.c.llama_memory_seq_rm(self.memory, sequence, position, -1)

    def decode(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits (B, V) of the last of tokens (B, S) that begin at a position."""
        batch, (sequences, length) = self.batch, ids.shape
        batch.n_tokens = sequences * length
        for sequence in range(sequences):
            for i in range(length):
                at = sequence * length + i
                batch.token[at], batch.pos[at] = int(ids[sequence, i]), position + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = i == length - 1
        if status := self.c.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        rows = [self.c.llama_get_logits_ith(self.context, (i + 1) * length - 1) for i in range(sequences)]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: int | None) -> None:
    pass

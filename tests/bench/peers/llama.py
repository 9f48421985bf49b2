"""Weights that llama.cpp reads in its decode step, GB/s: the best of --steps of --sequences that share a prompt. It does not sample.

Makes a GGUF file of the model directory where there is none yet, without a tokenizer. Loading and prefill are not counted.
"""

import argparse
import ctypes
import json
import os
import time

import gguf
import llama_cpp
import numpy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("gguf")
parser.add_argument("--sequences", type=int, required=True)
parser.add_argument("--context", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
args = parser.parse_args()

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(path):
    """Name, safetensors type, shape and bytes of each tensor."""
    data = numpy.memmap(path, numpy.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, one in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            begin, end = one["data_offsets"]
            yield name, one["dtype"], one["shape"], data[start + begin : start + end]


def gguf_name(name):
    name, part = name.rsplit(".", 1)
    if name.startswith("model.layers."):
        _, _, layer, name = name.split(".", 3)
        return f"blk.{layer}.{NAMES[name]}.{part}"
    return f"{NAMES[name]}.{part}"


def write_gguf(directory, path):
    with open(f"{directory}/config.json") as file:
        config = json.load(file)
    writer = gguf.GGUFWriter(path + ".part", "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, dtype, shape, data in tensors(f"{directory}/model.safetensors"):
        if dtype == "F32":
            writer.add_tensor(gguf_name(name), data.view(numpy.float32).reshape(shape))
        elif len(shape) == 1:
            wide = (data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
            writer.add_tensor(gguf_name(name), wide)
        else:
            halves = data.reshape(*shape[:-1], 2 * shape[-1])
            writer.add_tensor(gguf_name(name), halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.rename(path + ".part", path)


def fill(batch, entries, with_logits):
    """Entries are (token, position, sequence)."""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
        batch.logits[i] = with_logits or i + 1 == len(entries)


def best_step(model):
    size = max(args.sequences, args.context)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = args.context + args.sequences * args.steps
    params.n_batch = params.n_ubatch = size
    params.n_seq_max, params.kv_unified = args.sequences, True
    params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    fill(batch, [(17 * i % 1000, i, 0) for i in range(args.context)], False)
    assert llama_cpp.llama_decode(context, batch) == 0
    memory = llama_cpp.llama_get_memory(context)
    for sequence in range(1, args.sequences):
        llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
    best = float("inf")
    for step in range(args.steps):
        fill(batch, [(31 * sequence % 1000, args.context + step, sequence) for sequence in range(args.sequences)], True)
        began = time.perf_counter()
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_synchronize(context)
        best = min(best, time.perf_counter() - began)
    return best


if not os.path.exists(args.gguf):
    write_gguf(args.model, args.gguf)
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(args.gguf.encode(), llama_cpp.llama_model_default_params())
assert model, "llama.cpp cannot load the file"
print(llama_cpp.llama_model_size(model) / 1e9 / best_step(model))

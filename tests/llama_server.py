"""llama-server, as the package xllamacpp builds it: `python llama_server.py MODEL MMPROJ` prints its address."""

from __future__ import annotations

import sys
from typing import Any


def serve(model: str, mmproj: str) -> None:
    """Serve on a free port until stdin is closed. One thread, float32 KV cache, no flash attention."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = model, mmproj
    params.n_ctx, params.n_parallel, params.port, params.n_gpu_layers = 512, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.ui, params.cache_ram_mib = False, False, 0
    server = xllamacpp.Server(params)
    sys.stdout.write(f"listening on {server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])

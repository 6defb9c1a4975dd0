"""The command `vlm-serve`: a bundle for other programs and, at `/`, for people."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from vlm_models import command
from vlm_models.errors import DependencyError
from vlm_runtime.flags import (
    Device,
    Engine,
    FlashAttention,
    KVCacheType,
    MaxContext,
    Threads,
    Verify,
    known_device,
    known_kv_cache,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

_ACCESS = "Who may ask"
_LIMITS = "Limits of one request"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@app.command(epilog="Exit codes: 0 done, 2 bad input, 3 a package, an engine or a device is missing.")
def serve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that vlm-export wrote.")],
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; 0.0.0.0 is every network.", rich_help_panel=_ACCESS)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="VLM_API_KEY", help="What clients must send.", rich_help_panel=_ACCESS),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A site whose pages may ask; repeat for several.", rich_help_panel=_ACCESS),
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host pictures may be fetched from, NAME[:PORT][=ADDRESS]; repeat for several.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name for clients; else the bundle's.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="How many requests may wait; more get 429.")] = 64,
    conversations: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="How many go on without being read anew: one KV cache each."),
    ] = 4,
    grace: Annotated[
        float, typer.Option(min=0, metavar="S", help="How long an answer may still run after SIGTERM or Ctrl-C.")
    ] = 10.0,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, metavar="N", help="Its body, in MB.", rich_help_panel=_LIMITS)
    ] = 32.0,
    max_images: Annotated[int, typer.Option(min=1, metavar="N", help="Its pictures.", rich_help_panel=_LIMITS)] = 16,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, metavar="N", help="Of each picture.", rich_help_panel=_LIMITS)
    ] = 50.0,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of its answer.", rich_help_panel=_LIMITS)] = 4096,
    max_seconds: Annotated[
        float, typer.Option(min=0.001, metavar="S", help="Its answer may take.", rich_help_panel=_LIMITS)
    ] = 300.0,
    engine: Engine = None,
    device: Device = "cpu",
    threads: Threads = None,
    max_context: MaxContext = None,
    kv_cache: KVCacheType = None,
    flash_attention: FlashAttention = None,
    verify: Verify = True,
) -> None:
    """Serve an exported model: OpenAI's chat API for programs, a chat page for people.

    **Then:**  open http://127.0.0.1:8000, or point an OpenAI client at http://127.0.0.1:8000/v1
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise DependencyError(f"vlm-serve needs {name}: pip install 'vlm-export[serve]'")
    where, cache = known_device(device), known_kv_cache(kv_cache)
    from vlm_runtime.server.auth import is_loopback
    from vlm_runtime.server.limits import Limits
    from vlm_runtime.server.listen import listen, run
    from vlm_runtime.server.options import ServerOptions

    options = ServerOptions(
        api_key=api_key,
        origins=tuple(allow_origin or ()),
        loopback=is_loopback(host),
        queue=queue,
        image_hosts=tuple(image_host or ()),
        model_name=model_name,
        limits=Limits(
            body_bytes=int(max_body_mb * 1e6),
            images=max_images,
            pixels=int(max_megapixels * 1e6),
            tokens=max_tokens,
            seconds=max_seconds,
        ),
    )
    with listen(host, port) as socket:
        from vlm_runtime.vlm import load

        vlm = load(
            bundle,
            engine=engine,
            threads=threads,
            max_context=max_context,
            device=where,
            kv_cache=cache,
            flash_attention=flash_attention,
            conversations=conversations,
            verify=verify,
        )
        run(vlm, options, socket, grace=grace)


def main() -> None:
    """The entry point of `vlm-serve`."""
    command.run(app)

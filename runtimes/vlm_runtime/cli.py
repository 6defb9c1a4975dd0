"""The command `vlm-run`: one answer about pictures, or a chat."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_models import command
from vlm_models.errors import InputError
from vlm_runtime.flags import (
    PANEL,
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

if TYPE_CHECKING:
    from vlm_runtime.answer import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

_SAMPLING = "How the answer is chosen"


@app.command(epilog="Exit codes: 0 done, 2 bad input, 3 an engine or a device is missing.")
def ask(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that vlm-export wrote.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Your question; without it, a chat begins.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", metavar="PATH", help="A picture; repeat for several.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message before the conversation.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take PROMPT as it is, image tokens included: no chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token_ids, engines, timings_ms, ...")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Keep what you type out of the chat's history.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The longest answer, in tokens.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A text that ends the answer; repeat for several.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(metavar="X", help="0 takes the best token always; 1 draws as trained.", rich_help_panel=_SAMPLING),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(metavar="N", help="Draw from the k best tokens (0: all).", rich_help_panel=_SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="X", help="Draw from the best tokens of this total probability.", rich_help_panel=_SAMPLING
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="X", help="Leave out tokens less probable than this × the best.", rich_help_panel=_SAMPLING
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1 discourages tokens that occurred.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Same seed, same answer.", rich_help_panel=_SAMPLING)
    ] = None,
    engine: Engine = None,
    device: Device = "cpu",
    threads: Threads = None,
    max_context: MaxContext = None,
    kv_cache: KVCacheType = None,
    flash_attention: FlashAttention = None,
    verify: Verify = True,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Print the operations and weights of the bundle's Core ML packages (engine mil), and end.",
            rich_help_panel=PANEL,
        ),
    ] = False,
) -> None:
    """Ask an exported model about pictures.

    **One answer:**  vlm-run BUNDLE --image cat.png "What is this?"

    **For programs:**  vlm-run BUNDLE --image cat.png "What is this?" --json

    **A chat:**  vlm-run BUNDLE --image cat.png   (then /help)
    """
    if explain:
        _explain(bundle, engine, asked=prompt is not None or bool(image) or as_json, verify=verify)
        return
    if as_json and prompt is None:
        raise InputError('--json needs a prompt: vlm-run BUNDLE --image a.png "What is this?" --json')
    if raw and prompt is None:
        raise InputError("--raw needs a prompt, with the model's image token once for each image")
    where, cache = known_device(device), known_kv_cache(kv_cache)
    settings: Settings = {
        "max_new_tokens": max_new_tokens,
        "stop": stop or (),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    from vlm_runtime.answer import split_settings
    from vlm_runtime.vlm import load

    split_settings(settings)  # a wrong value shows before a large bundle is read
    _plain_output()
    vlm = load(
        bundle,
        engine=engine,
        threads=threads,
        max_context=max_context,
        device=where,
        kv_cache=cache,
        flash_attention=flash_attention,
        verify=verify,
    )
    if prompt is None:
        from vlm_runtime.terminal import run_chat

        run_chat(vlm, system, image or (), settings, private=private)
    elif as_json:
        answer = vlm.answer(prompt, image or (), system=system, raw=raw, **settings)
        typer.echo(json.dumps(_plain(answer), ensure_ascii=False))
    else:
        for piece in vlm.generate(prompt, image or (), system=system, raw=raw, **settings):
            typer.echo(piece, nl=False)
        typer.echo()


def main() -> None:
    """The entry point of `vlm-run`."""
    command.run(app)


def _explain(folder: Path, engine: str | None, *, asked: bool, verify: bool) -> None:
    """Print what engine mil reads, without running it."""
    if engine not in (None, "mil") or asked:
        raise InputError("--explain runs nothing: give it BUNDLE alone, or with --engine mil")
    from rich.console import Console

    from vlm_runtime.bundle import open_bundle
    from vlm_runtime.mil.explain import explain

    tables = explain(open_bundle(folder, verify=verify))
    _plain_output()
    for table in tables:
        Console().print(table)


def _plain(answer: Any) -> dict[str, Any]:
    """What `--json` prints, by the names of `Answer`; times in milliseconds to the microsecond."""
    plain = dict(vars(answer))
    plain["timings_ms"] = {name: round(value, 3) for name, value in answer.timings_ms.items()}
    return plain


def _plain_output() -> None:
    """Characters that the terminal cannot show must not end the answer."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

"""The commands that write text: `generate` and `chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bitsmith.cli.invocation import flags
from bitsmith.cli.options import fetched, remark
from bitsmith.errors import BitsmithError, printable

if TYPE_CHECKING:
    from bitsmith.run.generate import Continuation

_Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a .gguf or .cellm file, or org/name of the hub."
    ),
]
_Gen = Annotated[int, typer.Option("--gen", "-n", "--n-tokens", min=1, help="New tokens at most.")]
_Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the likeliest token, whatever the other options say.")
]
_TopK = Annotated[int, typer.Option("--top-k", help="Only the K likeliest tokens; 0 for all.")]
_TopP = Annotated[
    float, typer.Option("--top-p", help="Only the likeliest tokens that together reach P; 1 for all.")
]
_Penalty = Annotated[
    float, typer.Option("--repeat-penalty", help="Divide a seen token's positive logit by it; 1 for none.")
]
_Window = Annotated[int, typer.Option("--repeat-window", help="Tokens that the penalty looks back over.")]
_Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")]
_Tokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="A tokenizer.json, its folder, a GGUF or org/name, for a MODEL without a tokenizer beside it.",
    ),
]
_Ctx = Annotated[
    int | None, typer.Option("--ctx", min=1, help="Context in tokens; default: the model's positions.")
]


def generate(
    model: _Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue.")],
    gen: _Gen = 64,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 40,
    top_p: _TopP = 1.0,
    repeat_penalty: _Penalty = 1.05,
    repeat_window: _Window = 64,
    seed: _Seed = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")
    ] = False,
    tokenizer: _Tokenizer = None,
    ctx: _Ctx = None,
    backend: Annotated[
        Literal["own", "llama"],
        typer.Option("--backend", help="bitsmith's forward, or real llama.cpp (a GGUF, the `llama` extra)."),
    ] = "own",
) -> None:
    """Continue a prompt with MODEL, as text comes; speed and memory go to stderr."""
    from bitsmith.run.sampling import Sampling

    model = fetched(model)
    sampling = Sampling(temperature, top_k, top_p, repeat_penalty, repeat_window, seed)
    if backend == "llama":
        from bitsmith.run.generate import continue_with_llama
        from bitsmith.run.vocabulary import chat_prompt

        text = chat_prompt(model, prompt, tokenizer) if chat else prompt
        found = continue_with_llama(model, text, gen, sampling, ctx_tokens=ctx, emit=_write)
    else:
        from bitsmith.run.continuation import continue_prompt

        found = continue_prompt(
            model, prompt, gen, sampling, chat=chat, tokenizer=tokenizer, ctx_tokens=ctx, emit=_write
        )
    typer.echo()
    remark(_told(found))


def chat(
    model: _Model,
    gen: _Gen = 512,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 40,
    top_p: _TopP = 1.0,
    repeat_penalty: _Penalty = 1.05,
    repeat_window: _Window = 64,
    seed: _Seed = 0,
    tokenizer: _Tokenizer = None,
    ctx: _Ctx = None,
) -> None:
    """Talk with MODEL: a line of stdin is a message; the end of stdin ends the talk."""
    from bitsmith.run.continuation import Chat
    from bitsmith.run.evaluate import open_model
    from bitsmith.run.sampling import Sampling
    from bitsmith.run.vocabulary import open_teller

    sampling = Sampling(temperature, top_k, top_p, repeat_penalty, repeat_window, seed)
    with open_model(fetched(model)) as opened, open_teller(opened, tokenizer) as teller:
        talk = Chat(opened, sampling, teller, ctx)
        for line in _lines():
            try:
                found = talk.say(line, gen, _write)
            except BitsmithError as error:
                typer.echo(f"error: {printable(str(error), 2000)}", err=True)
                if not sys.stdin.isatty():
                    raise typer.Exit(error.exit_code) from error
                continue
            typer.echo()
            remark(_told(found))


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty() and flags.shows_progress:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _write(text: str) -> None:
    if sys.stdout.isatty():  # a model may spell a terminal's control sequences
        text = "".join(
            c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
        )
    typer.echo(text, nl=False)
    sys.stdout.flush()


def _told(found: Continuation) -> str:
    memory = ""
    if found.weight_bytes is not None and found.cache_bytes is not None:
        memory = f"; weights {found.weight_bytes:,} bytes, states {found.cache_bytes:,} bytes"
    return (
        f"prompt {found.prompt_tokens} tokens, {_rate(found.prompt_rate)}; "
        f"new {found.n_tokens} tokens, {_rate(found.rate)}; ended by {found.stopped}{memory}"
    )


def _rate(rate: float | None) -> str:
    return "speed unmeasured" if rate is None else f"{rate:.1f} tokens/s"

"""Options that several commands share. Importing them imports no heavy package."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from vilu.cli import output as said
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.serving import AsyncClient

T = TypeVar("T")
Decorated = TypeVar("Decorated", bound="Callable[..., Any] | click.Command")


class FloatRange(click.FloatRange):
    """A range of numbers. click's own also takes nan, which no comparison refuses."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not a number.", param, ctx)
        return number


PATH = click.Path(path_type=Path)
SECONDS = FloatRange(min=0, min_open=True)
DEFAULT_URL = "127.0.0.1:8001"  # as in vilu.serving.address, which needs the client's packages
REPOSITORY = Path("serving/model_repository")


def default_cache() -> Path | None:
    """Return the folder that keeps embeddings and towers by default; None, with a note, where there is no home."""
    from vilu.data import cache

    try:
        return cache.default_cache()
    except UserError as error:
        said.note(f"{error}; until then none are kept")
        return None


def refuse_options(why: str, *names: str, others: bool = False) -> None:
    """Refuse options that were given on the command line and would be ignored: these, or with `others` all but these.

    Raises:
        UserError: "OPTION WHY".
    """
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and isinstance(option, click.Option) and (option.name in names) != others:
            raise UserError(f"{option.opts[0]} {why}")


def all_of(*options: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    """Return one decorator that adds these options in this order."""

    def add(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# A command receives these options as `image_column` and `caption_column`.
column_options = all_of(
    click.option(
        "--image-column", default="path", show_default=True, help="Column of a caption table that holds the paths."
    ),
    click.option(
        "--caption-column",
        default="caption",
        show_default=True,
        help="Column of a caption table, or key of the JSON files in shards, that holds the captions.",
    ),
)

# A command receives this option as `drop_known`.
drop_known_option = click.option(
    "--drop-known",
    is_flag=True,
    help="Leave out the samples that the head was trained on, which are not held-out data.",
)

# A command receives these options as `data`, `dataset`, `root`, `image_column`, `caption_column` and `cache`.
data_options = all_of(
    click.option(
        "--data",
        help="Image folder (one directory per class, or one per split), CSV, TSV or Parquet file of path and caption, "
        "or WebDataset shards (a.tar, 'shards/{000..010}.tar', 'shards/*.tar').",
    ),
    click.option(
        "--dataset",
        help="Named data set: digits, shapes or shapes-captions (embedded), or with --root one such as flowers102.",
    ),
    click.option(
        "--root", type=PATH, help="Folder that holds the named data sets, in the layout of CoOp's DATASETS.md."
    ),
    column_options,
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="VILU_CACHE",
        default=default_cache,
        show_default="VILU_CACHE, or ~/.cache/vilu",
        help="Folder that keeps the embeddings. They are computed once, resumed after a kill, and computed again when "
        "their inputs change.",
    ),
)

embeddings_option = click.option(
    "--embeddings",
    type=PATH,
    help="Read embeddings of any model from this file instead of images: image_embedding (N, D) floats; "
    "text_embeddings (K, D), or (N, D) for captions; labels (N,) integers below K; class_names (K strings) and "
    "logit_scale (a number, 100 by default) may be left out. They are the arrays of a .npz file (np.savez), the "
    "tensors of a .safetensors file (class_names as a JSON list in its metadata), or the columns of a .parquet file "
    "with lists (text_embeddings and class_names of the classes in NAME.text.parquet beside it).",
)
template_option = click.option(
    "--template", "templates", multiple=True, help="Prompt with one {} for the class name. Repeat it for several."
)


def dtype_option(default: str | None, shown: bool | str = True) -> Callable[[Decorated], Decorated]:
    """Return the option --dtype, which a command receives as `dtype`. `shown`: as click's `show_default`."""
    return click.option(
        "--dtype",
        type=click.Choice(["float16", "float32"]),
        default=default,
        show_default=shown,
        help="Number type that embeddings are stored in.",
    )


def _clip_options(default: str) -> Callable[[Decorated], Decorated]:
    return all_of(
        click.option(
            "--clip",
            "clip_name",
            help="CLIP to use: an open_clip model name, local-dir:FOLDER (open_clip's layout), hf-dir:FOLDER (Hugging "
            f"Face's), vilu-tiny or vilu-tiny-large.  [default: {default}]",
        ),
        click.option("--pretrained", help="Weights of the CLIP: an open_clip tag, a local file, or 'random'."),
    )


# A command receives these options as `clip_name` and `pretrained`.
clip_options = _clip_options("the checkpoint's")
train_clip_options = _clip_options("vilu-tiny for the embedded data sets, none for other data")

# These options say how to reach a server. A command receives them as `url`, `token`, `tls_ca`, `tls_cert`, `tls_key`.
connection_options = all_of(
    click.option(
        "--url",
        default=DEFAULT_URL,
        show_default=True,
        help="Address of the server: HOST:PORT for gRPC, http://HOST:PORT for HTTP.",
    ),
    click.option(
        "--token", metavar="TOKEN|@FILE", help="Token that the server asks for.  [default: $VILU_TOKEN, or none]"
    ),
    click.option("--tls-ca", type=click.Path(), help="PEM file of the authority that signed the server's certificate."),
    click.option("--tls-cert", type=click.Path(), help="PEM file with the client's own certificate."),
    click.option("--tls-key", type=click.Path(), help="PEM file with the key of the client's certificate."),
)
server_options = all_of(
    connection_options,
    click.option(
        "--timeout", type=SECONDS, default=60.0, show_default=True, help="Seconds to wait for the server's answer."
    ),
)
control_option = click.option(
    "--control-token",
    metavar="TOKEN|@FILE",
    help="Token that `vilu serve --control-token` was given.  [default: $VILU_CONTROL_TOKEN, or none]",
)

# These options set the certificates of a server and its clients, as `tls_cert`, `tls_key` and `tls_ca`.
listening_tls_options = all_of(
    click.option(
        "--tls-cert", type=PATH, help="PEM file with the server's certificate. gRPC clients must then use TLS."
    ),
    click.option("--tls-key", type=PATH, help="PEM file with the key of the certificate."),
    click.option(
        "--tls-ca", type=PATH, help="PEM file of an authority. Clients must show a certificate that it signed."
    ),
)
# A command receives this option as `record`.
record_option = click.option(
    "--record",
    envvar="VILU_RECORD",
    required=True,
    metavar="DIR|postgresql://...|@FILE",
    help="The record of `vilu serve --record`.  [default: $VILU_RECORD]",
)

# `vilu ask` and `vilu predict` share these: a command receives them as `labels`, `details` and `resume`.
labels_option = click.option(
    "--label", "labels", multiple=True, help="Candidate to choose from instead of the class set. Repeat it for several."
)
details_option = click.option(
    "--details",
    is_flag=True,
    help="Also give the likeliest labels, the labels that the failure predictor looks at, and other confidence scores.",
)
resume_option = click.option(
    "--resume",
    is_flag=True,
    help="Go on where an earlier run with this --output stopped: ask only what is left.",
)

# Commands with --cascade share these: a command receives the argument as `stages`.
stages_argument = click.argument("stages", nargs=-1, type=PATH, metavar="[CHECKPOINT]...")


def check_stages(stages: Sequence[Path], cascade: bool) -> None:
    """Refuse --cascade with fewer than two checkpoints, and checkpoints without --cascade. Raises UserError."""
    if cascade and len(stages) < 2:
        raise UserError("--cascade takes two or more checkpoints, as in --cascade small.safetensors large.safetensors")
    if stages and not cascade:
        raise UserError(f"{stages[0]}: name the checkpoint with --ckpt, or give --cascade")


host_option = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    callback=lambda context, option, host: host[1:-1] if host[:1] + host[-1:] == "[]" else host,  # IPv6 as in a URL
    help="Address to listen on.",
)


def with_client(url: str, token: str | None, options: dict[str, Any], work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Run `work` with a client of the server that a command's options name, and return its result."""
    import asyncio

    from vilu.serving import AsyncClient
    from vilu.serving.tokens import token_from

    async def run() -> T:
        async with AsyncClient(url, token=token_from(token, "VILU_TOKEN"), batch_size=64, **options) as client:
            return await work(client)

    return asyncio.run(run())

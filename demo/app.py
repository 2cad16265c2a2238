#!/usr/bin/env python
"""Shows what models see in an image, in a browser: masks, panoptic maps, and the pictures inside each method.

    python demo/app.py
    python demo/app.py --model output/panoptic_fcn_synthetic --model "K-Net=configs/.../knet.yaml:knet.pth" --port 8000

Without --model, every folder of output/ that holds config.yaml and model_final.pth. The page is served on this machine
alone, loads nothing from elsewhere, and models are read without executing anything in their files.

Needs Gradio: pip install --no-build-isolation -e '.[viewer]'.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils.logger import setup_logger

from convmask.demo.local_page import LocalPage
from convmask.demo.models import Models, Session, find_models, model_files
from convmask.demo.uploads import UploadLimits, read_upload, reduced
from convmask.demo.view import figure_html, gallery_html, legend, picture, rows, summary, table_html
from convmask.engine import ConfigError, one_line_errors
from convmask.engine.errors import user_errors

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError:
    gr = None

logger = logging.getLogger("convmask.viewer")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# As requests name them. Some versions of Starlette cut the port off at the first colon: "[" is then all that is left of
# an address of IPv6, and no site can have that name.
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]", "[")
LEAST_SIDE = 32
STYLE = (Path(__file__).parent / "app.css").read_text()
# Of Gradio: no statistics, no record of runs in the browser, and none of the variables that would share the page.
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_SHARE": "False"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="MODEL", help="a folder, NAME=FOLDER or NAME=CONFIG:WEIGHTS")
    add("--output", default="output", metavar="DIR", help="where models are looked for without --model: %(default)s")
    add("--host", default=LOOPBACK[0], help="address to listen at: %(default)s, this machine alone")
    add("--port", type=int, help="to listen at: the first free one from 7860")
    add("--max-megabytes", type=float, default=20, help="of an uploaded file: %(default)s")
    add("--max-megapixels", type=float, default=40, help="of an uploaded image: %(default)s")
    add("--side", type=int, default=1280, help="longer images are reduced to so many pixels: %(default)s")
    add("--keep", type=int, default=5, help="models in memory: %(default)s")
    add("--browser", action="store_true", help="open the page")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to all configs")
    args = parser.parse_args(arguments)
    if args.side < LEAST_SIDE:
        parser.error(f"--side {args.side} is less than {LEAST_SIDE}")
    if args.keep < 1:
        parser.error(f"--keep {args.keep} is less than 1")
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not between 1 and 65535")
    for name in ("max_megabytes", "max_megapixels"):
        # nan is not between them either
        if not 0.001 <= getattr(args, name) <= 1e6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not between 0.001 and a million")
    args.host = args.host.lower().removeprefix("[").removesuffix("]")
    return args


class Card:
    """The parts of the page that belong to one model."""

    def __init__(self, name: str, models: Models) -> None:
        """Takes the model's name; the parts are placed by the methods."""
        self.name, self.info = name, models.infos[name]
        self.groups: list[Any] = []
        self.sliders: list[Any] = []

    def place_sliders(self, visible: bool) -> None:
        """Its thresholds."""
        if not self.info.thresholds:
            return
        with gr.Accordion(f"Thresholds of {self.name}", open=False, visible=visible) as group:
            for threshold, value in self.info.thresholds:
                self.sliders.append(gr.Slider(threshold.low, threshold.high, value, step=0.01, label=threshold.label))
        self.groups.append(group)

    def place_masks(self, visible: bool) -> None:
        """Its objects."""
        with gr.Column(visible=visible, min_width=280) as group:
            self.summary = gr.Markdown(self._title())
            self.masks = gr.HTML()
        self.groups.append(group)

    def place_regions(self, visible: bool) -> None:
        """Its panoptic or semantic map with a legend."""
        with gr.Column(visible=visible, min_width=280) as group:
            gr.Markdown(self._title())
            self.regions = gr.HTML()
        self.groups.append(group)

    def place_inside(self, visible: bool) -> None:
        """Its inner pictures."""
        with gr.Column(visible=visible) as group:
            gr.Markdown(self._title())
            self.inside = gr.HTML()
        self.groups.append(group)

    def _title(self, text: str = "") -> str:
        return f"**{self.name}** ({self.info.method})" + (f": {text}" if text else "")

    def draw(self, session: Session, threshold: float) -> dict[Any, Any]:
        """Updates of everything that depends on the result and the score threshold."""
        # another image may take their place meanwhile
        result, image = session.results.get(self.name), session.image
        if result is None or image is None:
            hint = "" if image is None else "not run yet"
            return {self.summary: self._title(hint), self.masks: "", self.regions: ""}
        masks, regions = "This model gives no objects.", "This model gives objects alone."
        if result.objects is not None:
            drawn = picture(image, result.objects, threshold)
            masks = figure_html(drawn, f"objects of {self.name}", photo=True)
        if result.regions is not None:
            size = image.shape[0], image.shape[1]
            drawn = picture(image, result.regions, threshold)
            regions = figure_html(drawn, f"map of {self.name}", photo=True) + legend(result.regions, threshold, size)
        return {self.summary: self._title(summary(result, threshold)), self.masks: masks, self.regions: regions}

    @property
    def outputs(self) -> list[Any]:
        """What :meth:`draw` updates."""
        return [self.summary, self.masks, self.regions]


class Page:
    """The page: components, and what happens when they are used."""

    def __init__(self, models: Models, limits: UploadLimits) -> None:
        """Builds the page for some models."""
        self.models, self.limits = models, limits
        self.cards = [Card(name, models) for name in models.infos]
        first = list(models.infos)[:5]
        with gr.Blocks(title="ConvMask viewer", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            self.session = gr.State(Session())
            with gr.Row():
                with gr.Column(scale=1, min_width=270):
                    self._place_controls(first)
                with gr.Column(scale=3, min_width=440):
                    self._place_results(first)
            self._connect()

    def _place_controls(self, first: list[str]) -> None:
        gr.Markdown("## ConvMask")
        label = f"Image, at most {self.limits.bytes / 2**20:g} MiB"
        self.upload = gr.File(label=label, file_types=["image"], height=160, elem_id="upload")
        self.example = gr.Button("Take an image of the data set", size="sm", elem_id="example")
        self.image = gr.HTML(elem_id="image")
        choices = [(f"{card.name} ({card.info.method})", card.name) for card in self.cards]
        self.chosen = gr.CheckboxGroup(choices, value=first, label="Models")
        self.run = gr.Button("Run", variant="primary", elem_id="run")
        self.score = gr.Slider(0, 1, 0.3, step=0.01, label="Least score of an object", elem_id="score")
        self.with_inside = gr.Checkbox(True, label="Inner pictures")
        self.detection = gr.Number(1, label="Inner pictures of detection", precision=0, minimum=1)
        for card in self.cards:
            card.place_sliders(card.name in first)

    def _place_results(self, first: list[str]) -> None:
        self.message = gr.Markdown(Session().problem, elem_id="message")
        # hidden tabs are rendered too: they would lose the results that come while they are hidden
        with gr.Tab("Masks", render_children=True), gr.Row(elem_classes="cards"):
            for card in self.cards:
                card.place_masks(card.name in first)
        with gr.Tab("Panoptic map", render_children=True), gr.Row(elem_classes="cards"):
            for card in self.cards:
                card.place_regions(card.name in first)
        with gr.Tab("Objects", render_children=True):
            self.table = gr.HTML(elem_id="objects")
        with gr.Tab("Inner pictures", render_children=True):
            for card in self.cards:
                card.place_inside(card.name in first)

    def _connect(self) -> None:
        """Who calls whom: an image or a threshold runs models, the score redraws, both without waiting for pictures."""
        sliders = [slider for card in self.cards for slider in card.sliders]
        drawn = [self.message, self.table, *(part for card in self.cards for part in card.outputs)]
        inside = [self.message, *(card.inside for card in self.cards)]
        groups = [group for card in self.cards for group in card.groups]
        run_inputs = [self.session, self.chosen, self.score, *sliders]
        inside_inputs = [self.session, self.chosen, self.with_inside, self.detection, *sliders]

        def run(trigger: Any, models: str | None = None) -> None:
            done = trigger(partial(self.run_models, models), run_inputs, drawn, **ONE_AT_A_TIME)
            done.success(self.show_inside, inside_inputs, inside, **ONE_AT_A_TIME)

        for trigger, handler, given in (
            (self.upload.upload, self.take_upload, self.upload),
            (self.example.click, self.take_example, self.chosen),
        ):
            taken = [self.image, *drawn, *inside[1:]]
            run(trigger(handler, [self.session, self.score, given], taken, **ONE_AT_A_TIME).success)
        run(self.run.click)
        for card in self.cards:
            for slider in card.sliders:
                run(slider.release, card.name)
        for trigger in (self.detection.change, self.with_inside.change):
            trigger(self.show_inside, inside_inputs, inside, **ONE_AT_A_TIME)
        # what is drawn anew does not wait for a model that runs
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown = [self.session, self.chosen, self.score]
        self.score.change(self.redraw, shown, drawn, **quick)
        self.chosen.change(self.show_chosen, shown, [*groups, *drawn], **quick)

    def take_upload(self, session: Session, score: float, path: str) -> dict[Any, Any]:
        """A file was dropped."""
        return self._take(session, score, lambda: (read_upload(path, Path(path).name, self.limits), Path(path).name))

    def take_example(self, session: Session, score: float, chosen: list[str]) -> dict[Any, Any]:
        """The next image of a data set was asked for."""
        name = (chosen or list(self.models.infos))[0]
        # a prime steps through all images of a set, and shows different ones at once
        session.examples += 37
        return self._take(session, score, lambda: self.models.example(name, session.examples))

    def _take(self, session: Session, score: float, read: Callable[[], tuple[np.ndarray, str]]) -> dict[Any, Any]:
        """Reads an image, and forgets what belongs to the last one."""
        session.results.clear()
        session.image = None
        try:
            image, label = read()
            session.image = reduced(image, self.limits.side)
            session.problem = ""
        except user_errors() as error:
            session.problem = f"**{error}**"
        shown = ""
        if session.image is not None:
            size = f"{session.image.shape[1]} x {session.image.shape[0]}"
            shown = figure_html(session.image[:, :, ::-1], f"{label}, {size}", photo=True)
        emptied = {card.inside: "" for card in self.cards}
        return {self.image: shown, **emptied, **self._drawn(session, list(self.models.infos), score)}

    def run_models(
        self, only: str | None, session: Session, chosen: list[str], score: float, *sliders: float
    ) -> Iterator[dict[Any, Any]]:
        """Runs the chosen models, or the one whose threshold was moved, and shows one result after the other."""
        cards = [card for card in self.cards if card.name in chosen and only in (None, card.name)]
        problems = []
        for card in cards if session.image is not None else ():
            yield {self.message: f"Running {card.name} ..."}
            try:
                session.results[card.name] = self.models.predict(card.name, session.image, self._values(card, sliders))
            except Exception as error:
                problems.append(_problem(card.name, error))
                session.results.pop(card.name, None)
            yield self._drawn(session, chosen, score, card)
        if session.image is not None and not chosen:
            problems.append("Choose a model.")
        yield {self.message: session.problem or "\n\n".join(problems)}

    def show_inside(
        self, session: Session, chosen: list[str], wanted: bool, detection: float | None, *sliders: float
    ) -> Iterator[dict[Any, Any]]:
        """Inner pictures of the models that have a result."""
        if not wanted:
            yield {card.inside: "" for card in self.cards}
            return
        problems = []
        for card in self.cards:
            if card.name not in chosen or card.name not in session.results or session.image is None:
                continue
            try:
                number = max(0, int(detection or 1) - 1)
                values = self._values(card, sliders)
                pictures = self.models.inner_pictures(card.name, session.image, values, number)
                yield {card.inside: gallery_html(pictures) or "This method shows nothing of its inside."}
            except Exception as error:
                problems.append(_problem(card.name, error))
        if problems:
            yield {self.message: "\n\n".join(problems)}

    def redraw(self, session: Session, chosen: list[str], score: float) -> dict[Any, Any]:
        """The score threshold was moved: no model runs."""
        return self._drawn(session, chosen, score)

    def show_chosen(self, session: Session, chosen: list[str], score: float) -> dict[Any, Any]:
        """Other models were chosen."""
        updates = self._drawn(session, chosen, score)
        for card in self.cards:
            updates.update({group: gr.update(visible=card.name in chosen) for group in card.groups})
        return updates

    def _drawn(self, session: Session, chosen: list[str], score: float, card: Card | None = None) -> dict[Any, Any]:
        """Updates of the table, and of the cards of the chosen models or of one."""
        updates: dict[Any, Any] = {self.table: self._table(session, chosen, score)}
        if card is None:
            updates[self.message] = session.problem
        for each in [x for x in self.cards if x.name in chosen] if card is None else [card]:
            updates.update(each.draw(session, score))
        return updates

    def _table(self, session: Session, chosen: list[str], score: float) -> str:
        image, results = session.image, dict(session.results)
        if image is None:
            return ""
        size = image.shape[0], image.shape[1]
        found = [(name, results[name]) for name in self.models.infos if name in results and name in chosen]
        return table_html([row for name, result in found for row in rows(name, result, score, size)])

    def _values(self, card: Card, sliders: Sequence[float]) -> Sequence[float]:
        """The values of the sliders of one model."""
        start = sum(len(each.sliders) for each in self.cards[: self.cards.index(card)])
        return sliders[start : start + len(card.sliders)]


def _problem(name: str, error: Exception) -> str:
    """For the page; an error that the user cannot mend goes to the terminal with its traceback."""
    if isinstance(error, user_errors()):
        return f"**{name}: {error}**"
    logger.error("%s failed", name, exc_info=error)
    return f"**{name} failed: {type(error).__name__}: {error}** (more in the terminal)"


def serve(page: Page, args: argparse.Namespace, *, wait: bool = True) -> str:
    """Serves the page and returns its address, at once unless it is to ``wait`` until the server ends.

    Raises:
        OSError: the port is in use.
    """
    middleware = [Middleware(LocalPage)]
    if args.host in LOOPBACK:
        # a site elsewhere whose name leads to this machine gets nothing
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL_NAMES)))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.blocks.queue(default_concurrency_limit=4, max_size=32, api_open=False).launch(
        # as in the address of a page
        server_name=f"[{args.host}]" if ":" in args.host else args.host,
        server_port=args.port,
        inbrowser=args.browser,
        share=False,
        quiet=True,
        theme=theme,
        css=STYLE,
        footer_links=[],
        max_file_size=page.limits.bytes,
        state_session_capacity=8,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        app_kwargs={"middleware": middleware},
        prevent_thread_lock=True,
    )
    if wait:
        print(f"{address} (Ctrl-C ends)", flush=True)
        page.blocks.block_thread()
    return str(address)


def build(args: argparse.Namespace) -> Page:
    """The page for the models of the command line.

    Raises:
        ConfigError: no model, a wrong config, or Gradio is not installed.
    """
    if gr is None:
        raise ConfigError("the viewer needs Gradio: pip install --no-build-isolation -e '.[viewer]'")
    files = [model_files(text) for text in args.model] or find_models(args.output)
    if not files:
        raise ConfigError(
            f"no folder of {args.output}/ holds a config.yaml and a model_final.pth: `make demo` trains a small model "
            "in four minutes; or name one with --model"
        )
    limits = UploadLimits(int(args.max_megabytes * 2**20), int(args.max_megapixels * 1e6), args.side)
    # what was found and not asked for does not keep others from being shown
    return Page(Models(files, args.keep, args.opts, skip_wrong=not args.model), limits)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C; returns the exit code."""
    args = parse_arguments(arguments)
    for name in ("detectron2", "fvcore", "convmask"):
        setup_logger(name=name).setLevel("WARNING")
    # uploads and pictures are gone with the process, and nothing is told to anybody
    with one_line_errors(args.debug), tempfile.TemporaryDirectory(prefix="convmask_viewer_") as folder:
        os.environ.update(SETTINGS, GRADIO_TEMP_DIR=folder)
        serve(build(args), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

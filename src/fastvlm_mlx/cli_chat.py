"""`fastvlm chat`: a conversation at the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from fastvlm_mlx.answer import last_result
from fastvlm_mlx.errors import FastVLMError, InputError
from fastvlm_mlx.video import read_frames

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from fastvlm_mlx.chat import Chat
    from fastvlm_mlx.types import Frame, GenerationResult, OptionArgs

HELP = """\
/image FILE   show an image with the next question
/video FILE   show frames of a video, an animation or a folder of frames with it; --frames and --sampling say which
/undo         take back the images added since the last question, or else that question and its answer
/reset        begin anew, with the images of the beginning
/stats        where the time of the last answer went
/save FILE    keep the conversation; `fastvlm chat --load FILE` goes on with it
/quit         end (or Ctrl-D); Ctrl-C stops an answer"""


class Terminal:
    """Reads lines and answers them.

    Args:
        chat: the conversation.
        options: how to decode.
        format_stats: a result's times, for people.
        show: where pieces of an answer go.
        read_video: gives the frames of a file.
    """

    def __init__(
        self,
        chat: Chat,
        options: OptionArgs,
        format_stats: Callable[[GenerationResult], str],
        show: Callable[[str], object],
        read_video: Callable[[str], Sequence[Frame]] = read_frames,
    ) -> None:
        self.chat, self._options, self._format_stats, self._show = chat, options, format_stats, show
        self._read_video = read_video
        self._last: GenerationResult | None = None

    def run(self, lines: Iterator[str]) -> None:
        """Answer until the lines end or one says /quit. What is wrong with a line is said; the next one is read."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            left_out = self.chat.left_out
            try:
                if text.startswith("/"):
                    self._command(*text[1:].split(maxsplit=1))
                elif text:
                    self._ask(text)
            except FastVLMError as exc:  # the conversation is as before
                _say(str(exc))
            except OSError as exc:
                if not text.startswith("/"):
                    raise  # answers can't be written any more: the exit code has to tell
                _say(str(exc))
            except KeyboardInterrupt:
                _say("stopped")
            if self.chat.left_out not in ((), left_out):
                _say(_describe(len(self.chat.left_out)))

    def _ask(self, text: str) -> None:
        with closing(self.chat.stream(text, **self._options)) as pieces:
            try:
                self._last = last_result(pieces, self._show)
            except KeyboardInterrupt:
                self._show("\n")
                _say("stopped; the question is not part of the conversation")
            else:
                self._show("\n")

    def _command(self, name: str = "", argument: str = "") -> None:
        if name == "image" and argument:
            self.chat.add_image(argument)
            _say(f"the next question shows {argument}")
        elif name == "video" and argument:
            frames = self._read_video(argument)
            self.chat.add_image(*frames)
            _say(f"the next question shows {len(frames)} frame{'s' * (len(frames) != 1)} of {argument}")
        elif name == "save" and argument:
            self.chat.save(argument)
            _say(f"saved to {argument}")
        elif name == "undo" and not argument:
            self._undo()
        elif name == "reset" and not argument:
            self.chat.reset()
            _say("a new conversation")
        elif name == "stats" and not argument:
            _say(self._format_stats(self._last) if self._last else "there is no answer yet")
        elif name == "help":
            print(HELP, file=sys.stderr)
        else:
            raise InputError(f"/{name} {argument}".rstrip() + " is no command; /help lists them")

    def _undo(self) -> None:
        before = len(self.chat.unseen)
        gone = self.chat.undo()
        if gone is None:
            _say(f"taken back: {_images(before - len(self.chat.unseen))} that no question has shown")
            return
        question = " ".join(gone.question.split())  # an <image> stands on a line of its own
        shown = f"; the next question shows its {_images(len(gone.pictures))}" if gone.pictures else ""
        _say(f"taken back: {question}{shown}")


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _describe(left_out: int) -> str:
    """What a full context means for the latest question."""
    count = f"{left_out} earlier question{'s' * (left_out > 1)}"
    return f"the context is full: the model no longer sees {count}; /save keeps them"


def read_lines() -> Iterator[str]:
    """Lines of a person at a terminal, with history and editing, or of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    session = make_session()
    _say("/help lists the commands")
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue  # what was typed is thrown away
        except EOFError:
            return


def make_session() -> PromptSession[str]:
    """A line editor that completes commands and the files of /image and others."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter

    names = [line.split()[0] for line in HELP.splitlines()]
    files = PathCompleter(expanduser=True)
    completer = NestedCompleter.from_nested_dict(
        {n: files if n in ("/image", "/video", "/save") else None for n in names}
    )
    return PromptSession(completer=completer, complete_while_typing=False)


def _say(text: str) -> None:
    print(f"fastvlm: {text}", file=sys.stderr)

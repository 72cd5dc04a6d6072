"""One decoding step as it happened: what the heads guessed, what the model said, what was kept."""

from __future__ import annotations

from pydantic import Field

from harness.bounds import Count, Share
from harness.files import Frozen


class Guess(Frozen):
    """One token that a draft head proposes."""

    text: str = Field(description="text of the token")
    probability: Share = Field(description="probability that the head gives it")


class DrawnNode(Frozen):
    """One node of the draft tree."""

    path: tuple[Count, ...] = Field(description="ranks from the root on, counted from 0; empty for the root")
    text: str = Field(description="text of the drafted token")
    probability: Share | None = Field(description="probability that its head gave it; null for the root")
    wanted: str = Field(description="text of the token that the model itself puts after this node")
    is_kept: bool = Field(description="whether the node lies on the accepted path")


class DrawnStep(Frozen):
    """One step: before it, its drafts and their verification, after it."""

    model: str = Field(description="name of the model")
    before: str = Field(description="end of the text before the root")
    heads: tuple[tuple[Guess, ...], ...] = Field(description="best guesses of each head, the best first")
    nodes: tuple[DrawnNode, ...] = Field(description="nodes of the tree, the root first")
    bonus: str = Field(description="text of the token that the model puts after the accepted path")
    num_tokens: Count = Field(description="tokens that the step yielded: the accepted drafts and the bonus")

    @property
    def kept(self) -> str:
        """Return the text that the step yielded."""
        return "".join(node.text for node in self.nodes if node.is_kept and node.path) + self.bonus

"""Requests and responses of the HTTP service, with the bounds of requests."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_LISTS = 256  # of one request
MOST_EVENTS = 10_000  # of one history
MOST_LISTED = 20_000  # items of all lists of one response
Raw = Annotated[str, Field(min_length=1, max_length=256)]  # a raw id
Seconds = Annotated[int, Field(ge=-(2**53), le=2**53)]
Conditions = Annotated[
    list[Annotated[str, Field(max_length=1000)]],
    Field(max_length=16, description="Conditions on the items, e.g. category=Comedy or price<20."),
]
Length = Annotated[int, Field(ge=1, le=1000, description="Length of the lists.")]


def _check_size(k: int, lists: int) -> None:
    if k * lists > MOST_LISTED:
        raise ValueError(
            f"{lists} lists of {k} items are more than the {MOST_LISTED} items of one response: send several "
            "requests"
        )


class Request(BaseModel):
    """Base class of requests; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class History(Request):
    """The events of a visitor, oldest first."""

    items: Annotated[list[Raw], Field(max_length=MOST_EVENTS)]
    times: list[Seconds] | None = Field(None, description="Seconds since 1970; default: the end of the data.")
    events: list[Raw | None] | None = Field(None, description="Types of the events.")

    @model_validator(mode="after")
    def _same_length(self) -> History:
        for name, given in (("times", self.times), ("events", self.events)):
            if given is not None and len(given) != len(self.items):
                raise ValueError(f"{name} has {len(given)} values for {len(self.items)} items")
        return self


class RecommendRequest(Request):
    """Lists for users, or for visitors with given histories."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"histories": [{"items": ["50", "181"]}], "k": 5, "exclude_seen": True}}
    )

    users: Annotated[list[Raw], Field(max_length=MOST_LISTS)] | None = None
    histories: Annotated[list[History], Field(max_length=MOST_LISTS)] | None = None
    k: Length = 10
    only: Conditions = []
    exclude_seen: bool | None = Field(None, description="Default: as the run was evaluated.")

    @model_validator(mode="after")
    def _one_of_both(self) -> RecommendRequest:
        if (self.users is None) == (self.histories is None):
            raise ValueError("give either users or histories")
        _check_size(self.k, len(self.users or self.histories or ()))
        return self


class SimilarRequest(Request):
    """Lists of items similar to given ones."""

    items: Annotated[list[Raw], Field(min_length=1, max_length=MOST_LISTS)]
    k: Length = 10
    only: Conditions = []

    @model_validator(mode="after")
    def _of_bounded_size(self) -> SimilarRequest:
        _check_size(self.k, len(self.items))
        return self


class NewEvent(Request):
    """An event to append."""

    item: Raw
    time: Seconds | None = Field(None, description="Seconds since 1970; default: now.")
    event: Raw | None = Field(None, description="Type of the event.")
    key: Raw | None = Field(None, description="Chosen by the client: sending it again stores nothing twice.")


class AppendRequest(Request):
    """Events of one user, oldest first; the user may be new."""

    user: Raw
    events: Annotated[list[NewEvent], Field(min_length=1, max_length=1000)]


class ListedItem(BaseModel):
    """One item of a list."""

    item: str
    title: str
    score: float | None
    columns: dict[str, Any] = {}


class ListResponse(BaseModel):
    """The list of a user or visitor."""

    user: str | None = None
    ranked_by: str
    time: int
    items: list[ListedItem]
    unknown_items: list[str] = Field([], description="Items of the history that the model does not know.")


class RecommendResponse(BaseModel):
    """Lists in the order of the request."""

    lists: list[ListResponse]


class SimilarList(BaseModel):
    """The items similar to one item; scores are cosines."""

    item: str
    title: str
    items: list[ListedItem]


class SimilarResponse(BaseModel):
    """Lists in the order of the request."""

    lists: list[SimilarList]


class AppendResponse(BaseModel):
    """The events are on disk."""

    stored: int = Field(description="New events; those with a known key are not stored again.")


class Error(BaseModel):
    """What is wrong and how to mend it."""

    detail: str


class PastEvent(BaseModel):
    """An event of a user."""

    item: str
    title: str
    time: int
    event: str | None = None
    appended: bool


class HistoryResponse(BaseModel):
    """The last events of a user, oldest first."""

    user: str
    total: int
    events: list[PastEvent]


class Named(BaseModel):
    """An item with its title."""

    item: str
    title: str


class Health(BaseModel):
    """What is served."""

    status: str
    run: str
    model: str
    items: int
    users: int
    version: str

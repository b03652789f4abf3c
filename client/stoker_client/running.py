"""run, run_async and submit: one list of arguments, one way to run them."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from stoker_client import embedded
from stoker_client.asking import (
    Asked,
    check_options,
    checked_form,
    line_form,
    stated_place,
    template_for,
)
from stoker_client.batch import Batch, begin, say_left
from stoker_client.errors import BadInput
from stoker_client.gateway import Gateway, Place
from stoker_client.lines import check_rows, write_lines
from stoker_client.progress import Progress
from stoker_client.stopping import Stop, Stopped
from stoker_client.tables import table_of

Arguments = ParamSpec("Arguments")
Got = TypeVar("Got")


def _with_arguments_of(
    arguments: Callable[Arguments, Asked],
) -> Callable[[Callable[[Asked], Got]], Callable[Arguments, Got]]:
    """Give a function of Asked the arguments that make one, also where its signature is looked at."""

    def given(function: Callable[[Asked], Got]) -> Callable[Arguments, Got]:
        @wraps(function)
        def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Got:
            try:
                asked = arguments(*args, **kwargs)
            except TypeError as error:
                told = str(error).replace(f"{arguments.__name__}.__init__()", f"{function.__name__}()")
                raise TypeError(told) from None
            return function(asked)

        returned = inspect.signature(function, eval_str=True).return_annotation
        called.__signature__ = inspect.signature(arguments, eval_str=True).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return called

    return given


@_with_arguments_of(Asked)
def run(asked: Asked) -> Any:
    """Ask a model about every row; return the rows with their answers, in the same order.

    rows: a pandas or polars DataFrame, a polars LazyFrame (it is collected), a pyarrow Table: the same kind comes
        back, its rows, index and types as they were, with result columns appended. A list of dicts or of strings:
        a list of Answer comes back. A list of strings needs no prompt: each is one.
    prompt: the text for each row, with columns as slots: "Classify: {text}". Whatever else is in braces is text. Of
        a list of strings the only slot is filled. Numbers, dates, lists become text as Python and JSON write them.
    system: the system message, the same for all rows; it has no slots. A form's instruction is added to it.
    labels, schema, regex: one of them holds answers to a form: to one of these 2 to 500 strings; to a JSON schema of
        an object (or a pydantic model); to a regular expression, as RE2 has it. The model is told, answers are
        checked, a bad one is asked for once more and then is an error.
    model: as GET /v1/models names it; may be left out where there is just one.
    max_output_tokens: the most of one answer. temperature: 0 gives the likeliest words; None leaves it to the engine.
    cache: which earlier answers may serve: "off", "exact" (equal requests), "semantic" (also of the same meaning);
        None: as the gateway has it.
    window: how long the batch may take, "90m", "24h", "7d". priority: "low", "normal" or "high".
    budget_tokens: the most tokens that the batch may take; rows beyond it have the error budget_exceeded.
    trust: "external": prompts may go to external endpoints too. budget_money: the most that those which bill tokens may
        ask for all rows; without one, this or the key's, they are not used.
    skip_nulls: leave out the rows where a slot's value is missing (None, NaN), else they are refused.
    result_prefix: goes before the name of every result column.
    errors: "column": a row's error is in its column. "raise": raise JobsFailed if there is any; it has the results.
    resume: True: rows, prompt and options that were submitted before are that batch, running or completed: nothing runs
        twice, and rows that failed in it come back as they were. False: a new batch, which asks them again, and the
        others too unless the cache has their answers; with cache="off" pass just the rows that failed.
    base_url, api_key: the gateway, http://host:port/v1; else STOKER_URL and STOKER_API_KEY; else one is started on
        this machine, which ends with this process.
    progress: show a bar and notes.

    Result columns: `answer` (text: what was said, the label, or the schema's JSON), with a schema one for each of its
    properties (64 bit integers and floats, booleans, text; lists and objects as JSON text), `error` ("code: message",
    null if all is well; an answer that was cut has both), `prompt_tokens`, `completion_tokens` (what the
    row took: 0 for an earlier answer, null where nothing was asked), and `source` (engine, exact, semantic, …).

    Raises BadInput before anything is sent, NoGateway, Refused, BatchFailed, JobsFailed. Ctrl-C only ends the waiting.
    """
    return _submitted(asked, Stop()).results()


@_with_arguments_of(Asked)
def submit(asked: Asked) -> Batch:
    """The batch, without waiting for it: submit(…).results() is run(…), whose arguments it has."""
    return _submitted(asked, Stop())


@_with_arguments_of(Asked)
async def run_async(asked: Asked) -> Any:
    """As run(…), whose arguments it has, without blocking the event loop.

    Cancelling it ends the waiting and not the batch: the same call again follows it.
    """
    stop = Stop()
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()

    def tell(results: Any, error: BaseException | None) -> None:
        if ended.cancelled():
            return
        if error is None:
            ended.set_result(results)
        else:
            ended.set_exception(error)

    def work() -> None:
        results, raised = None, None
        try:
            results = _submitted(asked, stop).results()
        except Stopped:
            return
        except BaseException as error:
            raised = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(tell, results, raised)

    threading.Thread(target=work, name="stoker-client", daemon=True).start()
    try:
        return await ended
    finally:
        stop.set()


def _submitted(asked: Asked, stop: Stop) -> Batch:
    progress = Progress(shown=asked.progress)
    check_options(asked)
    table = table_of(asked.rows)
    template = template_for(asked, table)
    form = checked_form(asked, table)
    skipped = check_rows(table, template, skip_nulls=asked.skip_nulls)
    stated = stated_place(asked)

    def place() -> Place:
        return stated if stated is not None else embedded.place(stop=stop, progress=progress)

    batch_id = None
    try:
        with Gateway(place, stop=stop, progress=progress) as gateway:
            model = asked.model or _only_model(gateway)
            shared = line_form(asked, model=model, form=form, template=template)
            lines = write_lines(table, shared, skipped=skipped, stop=stop)
            with lines.file:
                batch_id = begin(gateway, asked, form=form, shared=shared, lines=lines, progress=progress)
    except KeyboardInterrupt:
        if batch_id is not None:
            say_left(progress, batch_id)
        raise
    finally:
        progress.close()
    return Batch(batch_id, asked=asked, table=table, form=form, lines=lines, place=place, stop=stop, progress=progress)


def _only_model(gateway: Gateway) -> str:
    models = gateway.models()
    if len(models) == 1:
        return models[0]
    if models:
        raise BadInput(f"model: there are {', '.join(models)}; name one of them")
    raise BadInput("model: no worker serves one now; start a worker, or name the model that one will serve")

"""Change the models of a service that runs, without a lost answer:

    python -m serving swap mood=models/mood-2 [NAME=MODEL_DIR ...] [--unload NAME] [--alias OTHER=NAME]
    python -m serving swap service.yaml          # its models and aliases, and no others

Every replica loads what is new beside what it serves, and answers from it once it is warm. This waits until all agree,
also those that come in place of others that died; there is one swap at a time. Where one refuses a model (it lies
damaged on its machine, or there is no memory for it), or not all agree in time, all go back to what they served, and
the exit status is 1. Run it on a machine of the cluster, where the directories are.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqmodels.errors import ConfigError
from serving.config import ModelSet, ServeConfig, named_models


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 where a replica refused a model. Raises SeqModelsError for a mistake of the user."""
    from serving import cluster  # imports Ray

    options = _parse(arguments)
    given = None if _is_file(options.targets) else named_models(options.targets)  # a mistake is told before Ray starts
    cluster.connect(options.address)
    with cluster.alone():
        return _swap(given, options)


def _swap(given: dict[str, str] | None, options: argparse.Namespace) -> int:
    from serving import cluster

    before, served = cluster.model_set(), alike(cluster.served())
    if given is None:
        after = pinned(ServeConfig.load(Path(options.targets[0])).model_set, {})
    else:
        after = pinned(changed(before, given, options), {name: served[name] for name in served if name not in given})
    try:
        reports = cluster.change_models(after, options.timeout_s)
        refused = {f"{name}: {reason}" for report in reports for name, reason in report["refused"].items()}
    except cluster.OvertakenError:
        raise  # to go back would undo what somebody else has done
    except cluster.DeploymentError as error:
        refused = {str(error)}
    if not refused:
        _say(reports)
        return 0
    for reason in sorted(refused):
        print(f"refused: {reason}", file=sys.stderr, flush=True)  # going back may take as long as going
    try:
        now = alike(cluster.change_models(before, options.timeout_s))
    except cluster.DeploymentError as error:
        print(f"not all went back to what they served: {error}; /v1/models says what is served", file=sys.stderr)
        return 1
    if others := [name for name, revision in served.items() if now.get(name) != revision]:
        print(
            f"not all is as it was: replicas serve other weights than before as {', '.join(others)}, for those are no "
            "longer in the directory that was named; name one that holds what is wanted",
            file=sys.stderr,
        )
    else:
        print("nothing has changed: every replica serves what it served before", file=sys.stderr)
    return 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m serving swap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets", nargs="*", metavar="NAME=MODEL_DIR", help="or one YAML file, as for python -m serving"
    )
    parser.add_argument(
        "--unload", action="append", default=[], metavar="NAME", help="no longer serve this model, or under this alias"
    )
    parser.add_argument("--alias", action="append", default=[], metavar="OTHER=NAME", help="a further name for a model")
    parser.add_argument(
        "--address", default="auto", help="of the service's Ray cluster (default: the only one on this machine)"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="until all agree, or else go back (default: 600)",
    )
    options = parser.parse_args(arguments)
    if not options.timeout_s > 0:
        parser.error("--timeout-s must be above 0")
    if not (options.targets or options.unload or options.alias):
        parser.error("name a model to swap, --unload or --alias")
    if _is_file(options.targets) and (options.unload or options.alias):
        parser.error("a YAML file says all that is to be served; write --unload and --alias there")
    return options


def _is_file(targets: Sequence[str]) -> bool:
    return len(targets) == 1 and targets[0].endswith((".yaml", ".yml"))


def changed(before: ModelSet, given: dict[str, str], options: Any) -> ModelSet:
    """Models given, unloaded and called by other names, over what is served. Raises ConfigError."""
    models = {**before.models, **given}
    revisions = {name: revision for name, revision in before.revisions.items() if name not in given}
    aliases = dict(before.aliases)
    for name in options.unload:
        if aliases.pop(name, None) is None and models.pop(name, None) is None:
            raise ConfigError(f"--unload {name}: no such model or alias; there are {', '.join([*models, *aliases])}")
        revisions.pop(name, None)
    aliases = {alias: name for alias, name in aliases.items() if name in models}
    for alias in options.alias:
        other, separator, name = alias.partition("=")
        if not separator:
            raise ConfigError(f"--alias {alias}: write OTHER=NAME")
        aliases[other] = name
    return ModelSet.parse({"models": models, "aliases": aliases, "revisions": revisions})


def alike(reports: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The revision of each model that all replicas serve at the same one."""
    first, *others = [report["revisions"] for report in reports] or [{}]
    return {name: at for name, at in first.items() if all(other.get(name) == at for other in others)}


def pinned(wanted: ModelSet, served: Mapping[str, str]) -> ModelSet:
    """With a revision for each model, so that all replicas serve these very weights, also where the name of the
    directory is the one that they know: that which is `served`, of a model that is to stay, whatever has become of its
    directory; of the others as they lie here. Raises what `load_members` raises."""
    from seqmodels.ensemble import load_members, revision_of

    kept = {name: at for name, at in {**served, **wanted.revisions}.items() if name in wanted.models}
    new = {name: directories for name, directories in wanted.directories.items() if name not in kept}
    found = {name: revision_of(load_members(directories), "probability") for name, directories in new.items()}
    return ModelSet.parse({**wanted.model_dump(mode="json"), "revisions": {**found, **kept}})


def _say(reports: Sequence[dict[str, Any]]) -> None:
    replicas = "1 replica serves" if len(reports) == 1 else f"{len(reports)} replicas serve"
    served = ", ".join(f"{name} at {revision}" for name, revision in reports[0]["revisions"].items())
    print(f"{replicas} {served}")

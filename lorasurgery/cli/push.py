"""`lorasurgery push`."""

from __future__ import annotations

import sys
from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("push")
@click.argument("path", metavar="PATH")
@click.argument("repo", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private; one that is public already is refused.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch, made where it is missing.  [default: main]")
@click.option("-m", "--message", help="Of the commit.")
@click.option("--base-model", metavar="ORG/NAME",
              help="The base as the Hub knows it, for adapter_config.json and the model card as they are sent; local "
              "files stay.")  # fmt: skip
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--overwrite-card", is_flag=True, help="Write a new model card (README.md) though there is one.")
@click.option("--dry-run", is_flag=True, help="Check PATH and say what would be sent; the Hub is not asked.")
@options.telling
@options.guarded
def command(path: str, repo: str, private: bool, revision: str | None, message: str | None,
            base_model: str | None, create_pr: bool, overwrite_card: bool, dry_run: bool,
            **chosen: Any) -> None:  # fmt: skip
    """Publish an adapter or checkpoint on the Hugging Face Hub, in one commit, with a model card.

    PATH is checked to be whole before anything is sent. The repository is made when it does not exist. An upload that
    was cut off publishes nothing, and repeating the command sends only what is missing. Pickles are never sent.

    \b
    Examples:
      lorasurgery push adapter me/llama-style --private
      lorasurgery push merged me/llama-merged --revision v2 -m "rank 64"
      lorasurgery push adapter org/shared --create-pr
      lorasurgery push adapter me/llama-style --base-model meta-llama/Llama-3.2-1B
    """
    from lorasurgery.hub.push import Target, check_account, show_bars
    from lorasurgery.ops.push import push

    ending = Ending.take(chosen)
    target = Target(repo, private, revision, create_pr)
    target.check()
    if not dry_run:
        check_account(target)
        show_bars(sys.stderr.isatty() and not (ending.quiet or ending.as_json))
    report = push(path, target, message=message, base_model=base_model, overwrite_card=overwrite_card, dry_run=dry_run)
    ending.finish(report)

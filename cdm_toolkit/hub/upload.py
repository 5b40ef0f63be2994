"""Put a finished model on the hub: whether that will be possible is asked before a run."""

from __future__ import annotations

from pathlib import Path

from cdm_toolkit.errors import BadOption, FileProblem

LEFT_HERE = (
    *("checkpoint-*", "checkpoint-*/**", "runs/**", "samples.jsonl"),
    *("answers-of-teacher-*/**", "weights-for-vllm-*/**"),
)
"""What an output folder has besides the model."""


def check_login() -> None:
    """See that the hub answers and knows who asks. BadOption where it does not."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise BadOption("push_to_hub", True, "it when you are logged in: run hf auth login, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # of huggingface_hub and the HTTP library below it
        raise BadOption("push_to_hub", True, f"it where the hub answers: {_line(error)}") from None


def upload(folder: Path, repository: str, *, private: bool | None = None) -> str:
    """Upload a model's folder, without its checkpoints, as one commit; gives its address.

    The repository is made where there is none, `private` or as its owner's are. FileProblem where the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=made.repo_id,
            commit_message="Distilled with cdm-toolkit",
            ignore_patterns=list(LEFT_HERE),
        )
    except Exception as error:  # of huggingface_hub and the HTTP library below it
        problem = f"the student is there, but {repository} on the hub could not be written ({_line(error)})"
        raise FileProblem(folder, problem, f"upload the folder: hf upload {repository} {folder}") from None
    return str(made)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

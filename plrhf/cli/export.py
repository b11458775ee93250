"""Makes other exports of a run: of one user, for vLLM, of what all users share; or pushes it to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import plrhf
from plrhf.cli.sections import Section, check_writable
from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.core.files import check_new
from plrhf.models.enrolment import save_shared
from plrhf.models.inference import export_of
from plrhf.models.merging import save_merged
from plrhf.models.policy import PersonalPolicy
from plrhf.models.vllm import save_for_vllm


class ExportConfig(Section):
    """All settings of the command; conf/export.yaml explains them."""

    run: str
    to: Literal["merged", "vllm", "shared", "hub"]
    user: str | None
    features: dict[str, Any] | None
    out: str
    private: bool
    trust_components: bool
    debug: bool


def export(settings: Settings) -> None:
    """Write the model, and print how it is loaded."""
    config = ExportConfig.read(settings, "")
    for name, value in (("user", config.user), ("features", config.features)):
        if config.to != "merged" and value is not None:
            cure = f"Leave {name} out, or set to=merged"
            raise bad_value(
                name, value, f"null with to={config.to}, which takes no single user", cure
            )
    if config.to == "hub":
        print(f"pushed: {plrhf.push_to_hub(config.run, config.out, private=config.private)}")
        print(f'next: plrhf.load("hf://{config.out}")')
        return
    out = Path(config.out)
    check_writable("out", str(out))
    check_new("out", out)
    if config.to == "shared":
        save_shared(export_of(config.run), out)
        print(f"export without users: {out} (plrhf.load loads it)")
        return
    model = plrhf.load(
        config.run,
        trust_components=config.trust_components,
        trust_remote_code=config.trust_components,
    )
    if not isinstance(model, PersonalPolicy):
        cure = "Give the run of a policy (model=dpo or grpo)"
        raise bad_value("run", config.run, "a policy, as only texts can be written plainly", cure)
    if config.to == "vllm":
        save_for_vllm(model, out)
        print(f"files for vLLM: {out} ({out / 'README.md'} has the commands)")
        return
    save_merged(model, out, user=config.user, features=config.features)
    print(f"plain model: {out} (AutoModelForCausalLM.from_pretrained and AutoTokenizer load it)")

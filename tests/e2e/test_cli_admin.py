"""The operators' tools over a real gateway: `forebay` verbs, and the SDK's admin clients."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import forebay
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result

from gateway.cli import main
from tests.e2e.asking import Answer, ask, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
VIEWER = "fba_0123456789-of-somebody-who-looks"


class Operator:
    """Somebody at a terminal beside the gateway."""

    def __init__(self, front: GatewayProcess, key_file: Path) -> None:
        self._front = front
        self._key_file = key_file

    async def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run a verb and return what it prints; `status` is the exit status that it should have."""
        found = ["--url", self._front.admin_url, "--admin-key-file", str(self._key_file)]
        result: Result = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, *found])
        assert result.exit_code == status, result.output
        return result.output

    async def json(self, *arguments: str) -> Any:
        """Run a verb and return the JSON it prints."""
        return json.loads(await self(*arguments, "--json"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front() -> AsyncIterator[GatewayProcess]:
    """A gateway with a fake engine, a price, and an operator who may only look."""
    async with FakeEngine(model="fake", tokens=4) as engine:
        models = {"fake": {**attached(engine.url), "price": {"input": 1, "output": 2}}}
        viewer = {"name": "looker", "tenant": "ops", "key": VIEWER, "role": "viewer"}
        async with GatewayProcess(models, keys=[viewer], defaults={"ceilings": {"grammars": True}}) as running:
            yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(front: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """The operator with the admin key."""
    path = tmp_path_factory.mktemp("operator") / "admin.key"
    path.write_text(front.admin_key)
    return Operator(front, path)


async def chat(front: GatewayProcess, secret: str) -> Answer:
    return await ask(front, CHAT, BODY, key=secret)


async def told(run: Operator, *arguments: str, holds: str) -> str:
    """Run a verb until it prints this: the books are written half a second behind."""
    found = ""

    async def is_there() -> bool:
        nonlocal found
        found = await run(*arguments)
        return holds in found

    await until(is_there, f"`forebay {' '.join(arguments)}` prints {holds!r}")
    return found


async def test_a_key_lives_from_its_tenant_to_its_end(front: GatewayProcess, run: Operator) -> None:
    made = await run("tenants", "create", "acme", "--rpm", "600", "--budget", "5usd/month", "--end-user-rpm", "60")
    assert "600 rpm" in made
    key = await run.json("keys", "create", "my-app", "--tenant", "acme", "--model", "fake", "--expires", "90d")
    assert key["key"]["state"] == "active"

    answer = await chat(front, key["secret"])
    assert answer.status == 200
    request_id = answer.headers["x-request-id"]

    listed = await told(run, "requests", "ls", "--tenant", "acme", holds=request_id)
    assert listed.splitlines()[0].startswith("TIME (UTC)")
    why = " ".join((await run("why", request_id)).split())
    assert f"The tenant 'acme', with the key '{key['key']['id']}', asked for a chat answer of the model 'fake'." in why
    assert "'fake-0' began at once" in why
    assert "tokens of prompt and 4 of answer" in why
    used = await run.json("usage", "--by", "tenant,model", "--tenant", "acme")
    assert [(row["tenant"], row["model"], row["requests"]) for row in used] == [("acme", "fake", 1)]
    assert "fake" in (await run("usage", "--by", "model")).splitlines()[1]
    csv = await run("usage", "--by", "tenant", "--tenant", "acme", "--csv", "--since", "1d")
    assert csv.splitlines()[0].startswith("day,tenant,")
    shown = await run.json("requests", "show", request_id)
    assert shown["usd"] == used[0]["usd"] != "0"
    budget = await told(run, "budgets", "ls", "--tenant", "acme", holds="5.00 USD/month")
    assert "never" not in budget

    rotated = await run.json("keys", "rotate", key["key"]["id"], "--overlap", "1h")
    for secret in (key["secret"], rotated["secret"]):
        assert (await chat(front, secret)).status == 200

    for old, secret in ((key, key["secret"]), (rotated, rotated["secret"])):
        assert "revoked" in await run("keys", "revoke", old["key"]["id"])

        async def is_refused(secret: str = secret) -> bool:
            return (await chat(front, secret)).status == 401

        assert await until(is_refused, "a revoked key is refused") < 1

    acts = await run.json("audit", "ls", "--target", key["key"]["id"])
    assert {act["action"] for act in acts} >= {"create_key", "rotate_key", "revoke_key"}
    assert key["secret"] not in json.dumps(acts)
    assert "revoke_key" in await run("audit", "ls", "--since", "1h")
    assert "records erased" in await run("tenants", "erase", "acme", "--yes")
    assert "acme: deleted" in await run("tenants", "rm", "acme", "--yes")


async def test_a_tenant_is_changed_where_it_is_named_and_nowhere_else(run: Operator) -> None:
    await run("tenants", "create", "beta", "--rpm", "10", "--tpm", "20k", "--budget", "2Mtokens/day")

    changed = await run.json("tenants", "set", "beta", "--rpm", "none", "--suspended")

    assert changed["suspended"]
    assert changed["limits"] == {"rpm": None, "tpm": 20_000, "parallel": None}
    assert changed["budgets"] == [{"tokens": 2_000_000, "usd": None, "per": "day"}]
    assert "20000 tpm" in await run("tenants", "show", "beta")
    assert "suspended" in await run("tenants", "ls")
    assert (await run.json("tenants", "set", "beta", "--active", "--budget", "none"))["budgets"] == []


async def test_a_policy_is_tried_kept_and_taken_back(run: Operator) -> None:
    change = ("--set", "retry.attempts=4")
    assert "retry.attempts" in await run("policies", "diff", "fairness", *change)
    assert "it can be applied" in await run("policies", "validate", "fairness", *change)
    assert "retry.attempt" in await run("policies", "validate", "fairness", "--set", "retry.attempt=4", status=2)

    assert "canary" in await run("policies", "canary", "fairness", *change, "--for", "5m", "--note", "a try")
    assert "applied" in await run("policies", "keep", "fairness")
    second = await run.json("policies", "apply", "fairness", "--set", "retry.max_retry_after=2s")
    assert second["overlay"] == {"retry.attempts": 4, "retry.max_retry_after": "2s"}
    assert "overlay" in await run("policies", "get", "fairness")
    back = await run.json("policies", "rollback", "fairness")
    assert back["revision"]["overlay"] == {"retry.attempts": 4}
    assert "a try" in await run("policies", "revisions", "fairness")
    assert "no cache policy" in await run("policies", "get", "cache", status=1)


async def test_settings_are_laid_over_and_reloaded(run: Operator, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("log:\n  level: warning\n")
    assert (await run.json("config", "apply", str(overlay)))["overlay"] == {"log.level": "warning"}
    assert "log.level" in await run("config", "revisions")
    assert "--expect 1" in await run("config", "apply", str(overlay), status=1)
    assert "not revision 7" in await run("config", "apply", str(overlay), "--expect", "7", status=1)
    assert (await run.json("config", "apply", str(overlay), "--expect", "1"))["number"] == 2
    assert (await run.json("config", "apply", str(overlay), "--force"))["number"] == 3
    await run("config", "apply", "--unset", "log.level")
    assert '"warning"' in await run("config", "rollback", "1")
    assert "Nothing differs." in await run("config", "reload")
    assert "server.port" in await run("config", "apply", "--set", "server.port=1", status=1)


async def test_a_tenant_s_share_and_what_it_may_ask_are_set_and_the_sharing_is_looked_at(run: Operator) -> None:
    await run("tenants", "create", "gamma", "--weight", "2.5", "--ceiling", "choices=2")
    changed = await run.json("tenants", "set", "gamma", "--ceiling", "body=8MiB")
    assert (changed["weight"], changed["ceilings"]["body"], changed["ceilings"]["choices"]) == (2.5, 8 * 2**20, 2)
    assert "grammars=no" in await run("tenants", "show", "gamma")
    assert (await run.json("fairness"))[0]["policy"] == "vtc-pc"
    assert "may be wasted" in await run("fairness", "fake")
    change = ("--set", "models.fake.fairness.policy=drr")
    assert "models.fake.fairness.policy" in await run("policies", "diff", "fairness", *change)


async def test_models_are_listed_with_prices(run: Operator) -> None:
    assert (await run("models", "ls")).splitlines()[1].split()[:1] == ["fake"]


async def test_a_role_that_does_not_suffice_is_told_so(front: GatewayProcess, run: Operator, tmp_path: Path) -> None:
    path = tmp_path / "viewer.key"
    path.write_text(VIEWER)
    look = Operator(front, path)

    refused = await look("tenants", "create", "mine", status=1)
    assert "this needs the role 'admin'" in refused
    assert "--admin-key-file" in refused
    assert "looker" in await look("keys", "ls")


async def test_the_sdk_reads_changes_and_goes_through_lists(front: GatewayProcess) -> None:
    def work() -> None:
        with forebay.Admin(front.admin_url, front.admin_key) as admin:
            budget = forebay.admin.Budget(usd="1.5", per="day")  # type: ignore[arg-type]  # pydantic takes the text
            tenant = admin.tenants.create("sdk", limits=forebay.admin.Limits(rpm=5), budgets=[budget])
            older = admin.tenants.show("sdk")
            assert older.ceilings is not None
            assert older.ceilings.grammars, "the settings' default"
            tenant.suspended = True
            tenant = admin.tenants.replace(tenant)
            assert tenant.suspended
            assert tenant.limits is not None
            assert tenant.limits.rpm == 5
            assert tenant.ceilings == older.ceilings
            with pytest.raises(forebay.PreconditionFailed):
                admin.tenants.replace(older)
            with pytest.raises(forebay.Conflict):
                admin.tenants.create("sdk")
            made = admin.keys.create("one", tenant="sdk")
            changed = admin.keys.change(made.key, name="two")
            assert admin.keys.show(changed.id).name == "two"
            assert admin.keys.rotate(changed.id, overlap_s=0).secret != made.secret
            assert admin.keys.revoke(changed.id).state == "revoked"
            assert [state.limit.usd for state in admin.budgets.list(tenant="sdk")] == [budget.usd]
            assert admin.policies.validate("fairness", {"retry.attempts": 2}).valid
            assert admin.policies.show("fairness").kind == "fairness"
            assert admin.config.show().digest == admin.system.version().config
            assert admin.system.health().status == "ready"
            assert [worker.id for worker in admin.workers.list()] == ["fake-0"]
            assert admin.models.show("fake").price.output_usd == 2
            assert "replace_tenant" in {entry.action for entry in admin.audit.list(target="sdk")}
            assert admin.usage.csv(by=["day", "model"]).startswith("day,")
            admin.tenants.delete(tenant)
            with pytest.raises(forebay.NotFound):
                admin.tenants.show("sdk")

    await asyncio.to_thread(work)
    async with forebay.AsyncAdmin(front.admin_url, front.admin_key) as admin:
        assert "test" in [tenant.id async for tenant in admin.tenants.list()]
        assert (await admin.models.show("fake")).name == "fake"
        assert [key.tenant async for key in admin.keys.list(tenant="test")] == ["test"]

"""A chat template's first rendering, in a child process that can be killed.

A template is a program that comes with a model. Its sandbox keeps it from files and from Python's
internals, but not from looping for ever or filling the memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

# A probe of a few words that renders to more than this is no chat template.
MAX_CHARACTERS = 1_000_000
MAX_BYTES = 4 << 30

# It imports only what renders, and says so before the clock starts.
_CHILD = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
print("ready", flush=True)
job = json.loads(sys.stdin.readline())
if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (job["max_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
size = 0
try:
    for messages, generate in (([user], True), ([user, assistant], False)):
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=job["template"],
            add_generation_prompt=generate, **job["variables"])
        size = max(size, len(texts[0]))
    print(json.dumps({"size": size}))
except BaseException as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}))
"""


@lru_cache(maxsize=64)
def probe_template(template: str, variables: str, name: str, timeout: float = 2.0) -> None:
    """Render two short conversations in a child process; a template that passed is not run again.

    Args:
        template: the Jinja source.
        variables: what the template reads beside the messages, as a JSON object.
        name: names the template in errors.
        timeout: seconds that the rendering may take; the start of the process is not counted.

    Raises:
        ValueError: it took longer, raised, or wrote more than a million characters.
    """
    job = {"template": template, "variables": json.loads(variables), "max_bytes": MAX_BYTES}
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            child.stdout.readline()  # type: ignore[union-attr]
            output, errors = child.communicate(json.dumps(job) + "\n", timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{name} did not render a two-message conversation within {timeout:g} s; it loops,"
                " or is no template to use"
            ) from error
        finally:
            child.kill()
    if not output:
        raise ValueError(f"{name} could not be rendered in a child process: {errors[-2000:]}")
    result = json.loads(output)
    if "error" in result:
        raise ValueError(f"{name} failed on a two-message conversation: {result['error']}")
    if result["size"] > MAX_CHARACTERS:
        raise ValueError(f"{name} wrote {result['size']} characters for a two-message conversation")

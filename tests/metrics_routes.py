"""``/metrics`` as vLLM mounts it, with the plugin and without, and no engine; the script of a
process of its own, since prometheus_client asks where to count as it is imported.

    python metrics_routes.py FOLDER   # of the plugin's files; several API servers where
                                      # PROMETHEUS_MULTIPROC_DIR is set

prints JSON: for "stock" and "ours" what each of REQUESTS answers; "schema": both OpenAPI schemas.
"""

from __future__ import annotations

import inspect
import json
import os
import sys

OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"}
REQUESTS = (
    ("GET", "/metrics", {}),
    ("GET", "/metrics", OPENMETRICS),
    ("GET", "/metrics", {"accept-encoding": "gzip"}),
    ("GET", "/metrics?name[]=vllm:num_requests_running", {}),
    ("HEAD", "/metrics", {}),
    ("POST", "/metrics", {}),
)


def _main(folder: str) -> None:
    from kvq_plugin import serving
    from kvq_plugin.serving import metrics

    os.environ[metrics.FOLDER] = folder
    serving.register()
    import vllm.entrypoints.serve.instrumentator.metrics as vllms
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from prometheus_client import Gauge

    labels = ["engine", "model_name"]
    for name, value in (("kv_cache_usage_perc", 0.25), ("num_requests_running", 1)):
        gauge = Gauge(f"vllm:{name}", name, labels, multiprocess_mode="mostrecent")
        gauge.labels("0", "m").set(value)
    files = metrics.Files(folder, 4)
    metrics.add(files.gauge(metrics.LAYERS, engine="0", format="int4"), 2)
    metrics.add(files.gauge(metrics.BYTES, engine="0"), 4096)
    metrics.put(files.gauge(metrics.RECENT, engine="0", stage="0"), 40)

    apps = {"ours": FastAPI()}
    vllms.attach_router(apps["ours"])
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # in one process two cannot count http_* apart
        apps["stock"] = FastAPI()
        inspect.unwrap(vllms.attach_router)(apps["stock"])
    clients = {name: TestClient(app) for name, app in apps.items()}
    clients["ours"].get("/nowhere")  # counted in http_requests_total, as nothing of REQUESTS is
    answers = {name: [] for name in apps}
    for method, path, headers in REQUESTS:
        for name, client in clients.items():
            r = client.request(method, path, headers={"accept-encoding": "", **headers})
            kind = [r.headers.get(h) for h in ("content-type", "content-encoding")]
            answers[name].append([r.status_code, *kind, r.text])
    answers["schema"] = [app.openapi() for app in apps.values()]
    print(json.dumps(answers))


if __name__ == "__main__":
    _main(*sys.argv[1:])

cd "$(dirname "$0")"; . ../common/env.sh
tiny
printf 'def coarse(completion, **row):\n    return float(len(completion) %% 3 == 0)\n' > rewards.py
lorelei train run.yaml name=c steps=3 reward.path=rewards.py:coarse algo.kind=rloo algo.drop_zero_variance_groups=true rollout.max_new_tokens=3 > out 2>&1
"$PY" - <<'P'
import glob, json, sys
last = sorted(glob.glob("runs/c/manifests/*.json"))[-1]
record = json.load(open(last))["adapters"]["default"]["record"]
steps = [json.loads(l) for l in open("runs/c/metrics.jsonl") if '"kind": "step"' in l]
logged = len({(r["step"], r["prompt_id"]) for r in map(json.loads, open("runs/c/rollouts.jsonl"))})
dropped = record["state"]["next_index"] - logged
counted = sum(v for s in steps for k, v in s.items() if isinstance(v, (int, float)) and "drop" in k and "group" in k)
print("sampled", record["state"]["next_index"], "kept", logged, "counted as dropped", counted)
print("PASS dropped groups are counted" if dropped == 0 or counted >= dropped * 0.9 else "FAIL dropped groups are counted nowhere")
P

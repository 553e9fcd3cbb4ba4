"""Four people of the chitchat conversations fine-tune SmolLM2-135M on NVFlare's simulator, each in a process, at its own rank.

    flora fetch smollm2-135m chitchat                   # once; 100 MB
    python examples/nvflare_job.py                      # two of its thirty blocks: a minute or two on two cores
    python examples/nvflare_job.py --export             # the folder of the job, to submit to a deployment
    python examples/nvflare_job.py MODEL ROWS.jsonl     # other files
"""
import sys
from pathlib import Path

from nvflare.recipe.sim_env import SimEnv

from flora.engines.nvflare import flora_recipe

out = Path("runs/nvflare").absolute()                           # the server's process has a folder of its own
files = [str(Path(given).absolute()) for given in sys.argv[1:] if not given.startswith("--")]
model, rows = files or ("smollm2-135m", "chitchat")
job = {
    "model_name_or_path": model, "num_hidden_layers": 2, "dataset": rows, "num_clients": 4, "num_rounds": 2,
    "partition": {} if files else {"by": "sender"}, "lora_r": [32, 16, 8, 4], "learning_rate": 1e-3, "max_steps": 4,
    "per_device_train_batch_size": 2, "max_length": 64, "max_examples_per_client": 64, "eval_rows_per_client": 3,
    "server_eval_rows": 12, "output_dir": str(out), "overwrite": True, "device": "cpu",
    "nvflare": {"server_model": True}}

if __name__ == "__main__":
    recipe = flora_recipe(job, "chitchat")
    recipe.execute(SimEnv(clients=recipe.sites, workspace_root=str(out.with_name("nvflare-workspace"))))
    print(f"every row is in {out / 'metrics.jsonl'}, the merged model in {out / 'model'}")

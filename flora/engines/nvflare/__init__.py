"""flora on NVFlare: components for its FedAvg workflow, and the loop of a client's script, on its Client API.

    recipe = flora_recipe("demo.yaml")
    recipe.execute(SimEnv(clients=recipe.sites))            # or PocEnv, ProdEnv

FedAvg sends every site the same model; here it holds only the version that is due, and a filter puts each client's own message in
its place: flora's bytes (messages.py) as one uint8 array, since NVFlare's arrays have no bfloat16 and one message would hold one
rank. Answers come in any order and are kept by the client that NVFlare says they are from.
"""
from flora.engines.nvflare.client import client_loop
from flora.engines.nvflare.parts import FloraAggregator, FloraFedAvg, FloraFilter, FloraPersistor
from flora.engines.nvflare.recipe import FloraRecipe, flora_recipe
from flora.engines.nvflare.settings import NVFlareConfig, settings

__all__ = ["FloraAggregator", "FloraFedAvg", "FloraFilter", "FloraPersistor", "FloraRecipe", "NVFlareConfig", "client_loop",
           "flora_recipe", "settings"]

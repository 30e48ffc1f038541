"`python -m lora_nb.live export` or `serve`."
from . import lora_live

if __name__ == "__main__": lora_live()

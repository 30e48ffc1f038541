"`python -m lora_nb.cli COMMAND ...` and `accelerate launch -m lora_nb.cli COMMAND ...`."
from . import main

if __name__ == "__main__": main()

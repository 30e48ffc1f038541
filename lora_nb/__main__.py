"`python -m lora_nb COMMAND ...`."
from .cli import main

if __name__ == "__main__": main()

from lightning_toys.cli import console

if __name__ == "__main__":  # whatever spawns a process imports this file in it
    console()

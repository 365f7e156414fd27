from lightning_toys.cli import main

if __name__ == "__main__":  # whatever spawns a process imports this file in it
    raise SystemExit(main())

from lightning_toys.cli import main

if __name__ == "__main__":  # a strategy that spawns its processes imports this file in each
    raise SystemExit(main())

from lightning_toys.cli import main

raise SystemExit(main())

from adapter_checks.command import main

raise SystemExit(main())

"""python -m cdcbridge"""

from cdcbridge.cli import main

main()

"""Find reasons why the bridge would not work, and give a fix for each.

The checks never leave a change in a database. They create only temporary slots, and roll back the statements they try.
"""

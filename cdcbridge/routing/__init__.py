"""Who gets which change, and the rows that say so. Pure: nothing here touches a database."""

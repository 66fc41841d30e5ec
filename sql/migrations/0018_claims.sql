-- Claims read the setting themselves, which the function asked for.
drop function if exists claimed_before(int);

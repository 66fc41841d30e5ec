-- Claims read the setting themselves, which the function asked for. Two functions of each consumer in order have other arguments
-- and results; they come back with this version's code.
drop function if exists claimed_before(int);
do $$
declare
    code text;
begin
    for code in
        select p.oid::regprocedure from pg_proc p
        where p.pronamespace = current_schema()::regnamespace and p.proname ~ '^(free_messages|cut_up)_[0-9]+$'
    loop
        execute 'drop function ' || code;
    end loop;
end $$;

-- A claim reads the setting itself, so claimed_before() is gone. free_messages_N() and cut_up_N() of each fifo consumer have other
-- arguments now, and are made anew with this version's code.
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

-- register_sequence_transaction(seq): call it before the transaction's first nextval of the sequence; null = the log's.
-- Raises CB004 (no such right, a cache), 42P01 (no such sequence). Locks: see above, to the end of the transaction.
create or replace function register_sequence_transaction(seq regclass default null) returns void
language plpgsql volatile set search_path from current as $$
begin
    if draw(coalesce(seq, 'messages_seq'), 0) is null and (pg_sequence_parameters(seq)).cache_size <> 1 then
        raise exception 'the sequence % has a cache: values that a session keeps cannot be guarded', seq
            using errcode = 'CB004', hint = format('alter sequence %s cache 1', seq);
    end if;
end $$;

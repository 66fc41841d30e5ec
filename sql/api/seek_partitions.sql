-- seek_partitions(consumer, target, chosen) -> what seek() does, with where each partition went: the offset that it had and the one
-- that it has now, and the time of the next message behind that; null where there is none yet.
create or replace function seek_partitions(consumer text, target text, chosen int default null)
returns table (partition int, old_seq bigint, new_seq bigint, "time" timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
    goal bigint;
    wanted int[];
    held int; -- a partition that another transaction holds
    one int;
    at offsets;
begin
    perform require_read_committed('seek()');
    goal := seq_before(target, compacts(c.config));
    wanted := array(select n.partition from newest_offsets(c.id) n
                    where chosen is null or n.partition = chosen order by n.partition);
    loop
        begin
            if held is not null then
                perform locked_offset(c, held);
            end if;
            held := (select w from unnest(wanted) w where not pg_try_advisory_xact_lock(partition_lock(c.id, w)) limit 1);
            exit when held is null;
            raise exception 'held' using errcode = 'CB000'; -- gives back those that it has
        exception
            when sqlstate 'CB000' then
                null;
        end;
    end loop;
    if wanted = '{}' then
        perform locked_offset(c, chosen); -- says that there is none
    end if;
    foreach one in array wanted loop
        at := locked_offset(c, one);
        partition := one;
        old_seq := at.seq;
        -- 'latest' never leads back: a group of tables alone may have read beyond what publishers hold back.
        new_seq := case when target = 'latest' then greatest(goal, at.seq) else goal end;
        perform put_offset(at, new_seq, null);
        "time" := (select coalesce(m.commit_time, m.inserted_at) from messages m
                   where m.partition = one and m.seq > new_seq order by m.seq limit 1);
        return next;
    end loop;
end $$;

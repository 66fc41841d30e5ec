-- claim_waiting(consumer_id, ...): Call claim_waiting_<id>(...) of this consumer.
create or replace function claim_waiting(consumer_id int, hint hints, places smallint[],
                                         taken bigint[], claimed bigint, moment timestamptz,
                                         until timestamptz, out all_taken bigint[],
                                         out plain boolean)
language plpgsql volatile as $$
declare
    k record;
begin
    __calls__
    all_taken := k.all_taken;
    plain := k.plain;
end $$;

-- message_key_seqs: the keys of a fifo consumer that have unfinished messages, each with the seq of
-- its first unfinished message.
create or replace view message_key_seqs as
    select m.consumer_id, m.key, min(m.seq) as seq
    from consumer_messages m join consumers c on c.id = m.consumer_id
    where c.mode = 'fifo' and m.key is not null
    group by m.consumer_id, m.key;
comment on view message_key_seqs
    is 'The keys of fifo consumers that have work, and the head of each';

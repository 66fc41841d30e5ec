-- message_key_seqs: which keys of a fifo consumer have unfinished messages, and each one's first in the log.
create or replace view message_key_seqs as
    select m.consumer_id, m.key, min(m.seq) as seq
    from consumer_messages m join consumers c on c.id = m.consumer_id
    where c.mode = 'fifo' and m.key is not null
    group by m.consumer_id, m.key;
comment on view message_key_seqs is 'The keys of fifo consumers that have work, and the head of each';

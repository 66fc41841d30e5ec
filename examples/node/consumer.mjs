// A consumer in Node: `npm ci && node consumer.mjs DSN CONSUMER` handles messages until SIGTERM.
//
// The handler's writes and the ack are one transaction: with `strict`, a message that somebody else has got in the meantime
// rolls both back. What throws comes again after the consumer's back-off.
import pg from "pg";

const [dsn, consumer] = process.argv.slice(2);
const client = new pg.Client({ connectionString: dsn });
let stopping = false;
let notified = false;
let wake = () => {};

async function handle(message) {
  console.log(message.topic, message.key, JSON.stringify(message.data.record));
}

async function settle(message) {
  await client.query("begin");
  try {
    await handle(message);
    await client.query("select cdcbridge.ack($1, $2, strict => true)", [consumer, [message.receipt]]);
    await client.query("commit");
  } catch (error) {
    await client.query("rollback");
    if (error.code === "CB006") return; // the receipt is stale: nothing to give back
    await client.query("select cdcbridge.nack($1, $2, reason => $3)", [consumer, [message.receipt], String(error)]);
  }
}

// Sleeps until something is appended, a timeout or a delay ends, or 10 s have passed: a notification may be lost.
async function wait() {
  const { rows } = await client.query("select least(10, cdcbridge.next_visible($1)) as seconds", [consumer]);
  if (stopping || notified) return;
  await new Promise((resolve) => {
    const timer = setTimeout(resolve, Math.max(0.01, rows[0].seconds) * 1000);
    wake = () => (clearTimeout(timer), resolve());
  });
}

process.on("SIGTERM", () => ((stopping = true), wake()));
client.on("notification", () => ((notified = true), wake()));
await client.connect();
// Whatever the server's defaults are: receive() refuses other isolation levels.
await client.query("set session characteristics as transaction isolation level read committed, read write");
await client.query("listen cdcbridge");
while (!stopping) {
  notified = false;
  const { rows } = await client.query("select * from cdcbridge.receive($1, 10)", [consumer]);
  for (const message of rows) await settle(message);
  if (rows.length === 0) await wait();
}
await client.end();

// Use each action once with the AWS SDK for JavaScript, and print as JSON what it found.
import {
  ChangeMessageVisibilityCommand, DeleteMessageBatchCommand, DeleteMessageCommand, GetQueueAttributesCommand,
  GetQueueUrlCommand, ListQueuesCommand, PurgeQueueCommand, ReceiveMessageCommand, SendMessageBatchCommand,
  SendMessageCommand, SQSClient,
} from "@aws-sdk/client-sqs";

const client = new SQSClient({ endpoint: process.argv[2], region: "eu-central-1", maxAttempts: 1 });
const found = {};
found.queues = (await client.send(new ListQueuesCommand({}))).QueueUrls;
const { QueueUrl } = await client.send(new GetQueueUrlCommand({ QueueName: "billing" }));
await client.send(new SendMessageCommand({
  QueueUrl,
  MessageBody: "grüße 🐘",
  MessageAttributes: {
    n: { DataType: "Number", StringValue: "1" },
    bytes: { DataType: "Binary", BinaryValue: new Uint8Array([0, 255]) },
  },
}));
const all = { QueueUrl, MessageAttributeNames: ["All"], MessageSystemAttributeNames: ["All"], WaitTimeSeconds: 10 };
const [first] = (await client.send(new ReceiveMessageCommand(all))).Messages;
found.first = {
  body: first.Body,
  n: first.MessageAttributes.n.StringValue,
  bytes: [...first.MessageAttributes.bytes.BinaryValue],
  count: first.Attributes.ApproximateReceiveCount,
};
const handle = { QueueUrl, ReceiptHandle: first.ReceiptHandle };
await client.send(new ChangeMessageVisibilityCommand({ ...handle, VisibilityTimeout: 0 }));
const [again] = (await client.send(new ReceiveMessageCommand(all))).Messages;
found.again = again.Attributes.ApproximateReceiveCount;
await client.send(new DeleteMessageCommand({ QueueUrl, ReceiptHandle: again.ReceiptHandle }));
const Entries = ["a", "b"].map((Id) => ({ Id, MessageBody: Id }));
found.sent = (await client.send(new SendMessageBatchCommand({ QueueUrl, Entries }))).Successful.map(({ Id }) => Id);
const messages = (await client.send(new ReceiveMessageCommand({ ...all, MaxNumberOfMessages: 10 }))).Messages;
const deleted = await client.send(new DeleteMessageBatchCommand({
  QueueUrl,
  Entries: [...messages.map(({ ReceiptHandle }, n) => ({ Id: `${n}`, ReceiptHandle })), { Id: "x", ReceiptHandle: "x" }],
}));
found.deleted = deleted.Successful.map(({ Id }) => Id);
found.failed = deleted.Failed.map(({ Id, Code }) => [Id, Code]);
await client.send(new PurgeQueueCommand({ QueueUrl }));
found.left = (await client.send(new GetQueueAttributesCommand({ QueueUrl, AttributeNames: ["All"] })))
  .Attributes.ApproximateNumberOfMessages;
const fifo = await client.send(new GetQueueUrlCommand({ QueueName: "search.fifo" }));
await client.send(new SendMessageCommand({
  QueueUrl: fifo.QueueUrl, MessageBody: "one", MessageGroupId: "g", MessageDeduplicationId: "1",
}));
const [grouped] = (await client.send(new ReceiveMessageCommand({ ...all, QueueUrl: fifo.QueueUrl }))).Messages;
found.group = grouped.Attributes.MessageGroupId;
try {
  await client.send(new GetQueueUrlCommand({ QueueName: "none" }));
} catch (error) {
  found.error = error.name;
}
console.log(JSON.stringify(found));

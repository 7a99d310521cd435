package delivery

import (
	"io"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// MaxRecipients bounds the recipients of one transaction.
const MaxRecipients = 1000

// Recipient is one recipient of a transaction.
type Recipient struct {
	Index   uint16 // in the envelope
	Address mailaddr.Address
}

// Content is a message as stored: header section and body, with CRLF line ends
// unless it goes out as BINARYMIME, neither dot-stuffed nor signed. Bytes is used if it is set, else Reader.
type Content struct {
	Bytes  []byte
	Reader io.ReaderAt // Length bytes from offset 0
	Length int64       // with Reader; header section included
}

// Size returns the length of the message in bytes.
func (c *Content) Size() int64 {
	if c.Bytes != nil {
		return int64(len(c.Bytes))
	}
	return c.Length
}

// Transaction is one message for recipients at one host.
type Transaction struct {
	Sender     mailaddr.Address // the return path on the wire; null for "<>"
	Recipients []Recipient      // 1 to MaxRecipients
	Content    Content
	EightBit   bool // the content holds octets above 127
	ClientDKIM bool // the client had signed: the content must not be changed
	// UTF8 is content that needs SMTPUTF8 (RFC 6531); a host without it gets
	// nothing. Recipients whose address needs it are found here.
	UTF8 bool
	// Binary is content that is not in text lines and goes out as BINARYMIME
	// in chunks (RFC 3030) or not at all.
	Binary bool
	// Chunking is the policy of the provider: policy.ChunkAuto and the others;
	// empty: that of the delivery section.
	Chunking string
	// Subject is for those who watch the dialogue.
	Subject trace.Subject
	// SignatureBytes is about how long Sign's result will be, for SIZE.
	SignatureBytes int
	// Sign returns header fields to put in front of the content, each ending
	// in CRLF; it is called once, when the host is ready for the data. If the
	// host lacks 8BITMIME, converted is the message in quoted-printable that
	// goes out in place of Content and must be signed in its place; else it is
	// nil. A nil Sign adds nothing.
	Sign func(converted []byte) ([]byte, error)
	// Commit returns when the attempt's journal record is on stable storage;
	// the end of the data is not sent before. A nil Commit waits for nothing.
	// An error breaks the attempt off: nothing is delivered.
	Commit func() error
	// Outcomes is overwritten and returned by Send, so that it can be reused.
	Outcomes []relay.Outcome
}

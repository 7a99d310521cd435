package engine

import (
	"bytes"
	"io"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// The fields by which providers tell mail apart and know where complaints go.
const (
	fieldFeedbackID     = "Feedback-ID"
	fieldCFBLAddress    = "CFBL-Address"     // RFC 9477 section 5.1
	fieldCFBLFeedbackID = "CFBL-Feedback-ID" // RFC 9477 section 5.2
)

// feedback puts the fields that policy wants in front of the message in hand
// into w.signer.added, for the signature to cover, and takes away those of the client
// that they replace. The transaction's content and the header are there already.
func (w *worker) feedback(work *queue.Work, dir *policy.Directory, domain *policy.Domain) {
	env := work.Env
	plan := dir.Feedback(domain.Name, env.Stream)
	if plan == nil || env.Internal {
		return // our own reports are about mail, and no mail to complain about
	}
	address, id := w.complaintPath(work, dir, domain, plan)
	own := findOwn(w.signer.header)
	wantID, wantCFBL := plan.AddsFeedbackID(), !address.IsNull()
	if plan.Replace && !env.ClientDKIM {
		w.cut(own, wantID, wantCFBL)
	} else {
		// A client's signature may also say that there is none (RFC 6376
		// section 8.15).
		wantID = wantID && own.feedbackID == 0 && !own.signedID
		wantCFBL = wantCFBL && own.cfbl == 0 && !own.signedCFBL
	}
	b := w.signer.added[:0]
	// The syntax is that of RFC 9477 section 5.1 and RFC 9477 section 5.2.
	if wantID {
		b = append(b, fieldFeedbackID+": "...)
		b = plan.AppendFeedbackID(b, env.Tag, env.Stream, dir.FeedbackTenantName(env.Tenant), domain.Name)
		b = append(b, "\r\n"...)
	}
	if wantCFBL {
		b = append(b, fieldCFBLAddress+": "...)
		b = append(append(append(b, address.Local...), '@'), address.Domain...)
		b = append(b, "; report=arf\r\n"...)
		if id != "" {
			b = append(b, fieldCFBLFeedbackID+": "...)
			b = append(append(b, id...), "\r\n"...)
		}
	}
	w.signer.added = b
	w.tx.SignatureBytes += len(b)
}

// complaintPath returns the address for CFBL-Address, null if there is none,
// and what tells the message if the address does not.
func (w *worker) complaintPath(work *queue.Work, dir *policy.Directory, domain *policy.Domain, plan *policy.FeedbackPlan) (address mailaddr.Address, id string) {
	address = plan.Address
	if plan.ReturnPath {
		address.Domain = domain.ReturnPath
	}
	// RFC 9477 section 3.1.1: the address is at the From domain, for which the
	// signature vouches, or, RFC 9477 section 3.1.2, below it.
	if address.Domain == "" || !address.Domain.IsSubdomainOf(work.Env.From) {
		return mailaddr.Address{}, ""
	}
	token := w.tx.Sender.Local
	if token == "" { // the client's mail must not be bounced, but may be complained about
		var err error
		if token, err = w.token(work, dir); err != nil {
			return mailaddr.Address{}, "" // it is wanted, but not worth keeping the mail back
		}
	}
	if plan.ReturnPath {
		address.Local = token
		return address, ""
	}
	// RFC 9477 section 3.3: it should be hard to forge.
	return address, token
}

// ownFields is what the client wrote of these fields.
type ownFields struct {
	feedbackID, cfbl     int  // how many
	signedID, signedCFBL bool // a signature of the client names them
}

func findOwn(header []byte) (own ownFields) {
	for at := 0; ; {
		name, end, ok := sign.NextField(header, at)
		if !ok {
			return own
		}
		switch {
		case sign.IsField(name, fieldFeedbackID):
			own.feedbackID++
		case sign.IsField(name, fieldCFBLAddress), sign.IsField(name, fieldCFBLFeedbackID):
			own.cfbl++
		case sign.IsField(name, "DKIM-Signature"):
			text := bytes.ToLower(header[at:end])
			own.signedID = own.signedID || bytes.Contains(text, []byte("feedback-id"))
			own.signedCFBL = own.signedCFBL || bytes.Contains(text, []byte("cfbl-"))
		}
		at = end
	}
}

// cut takes the client's own fields away. The header is in w.body, and so is all
// of a message that is not streamed: what is in front of a field moves over it.
func (w *worker) cut(own ownFields, id, cfbl bool) {
	if !(id && own.feedbackID > 0) && !(cfbl && own.cfbl > 0) {
		return
	}
	gone := 0
	for at := 0; ; {
		name, end, ok := sign.NextField(w.signer.header, at)
		if !ok {
			break
		}
		if id && sign.IsField(name, fieldFeedbackID) || cfbl && (sign.IsField(name, fieldCFBLAddress) || sign.IsField(name, fieldCFBLFeedbackID)) {
			copy(w.signer.header[gone+end-at:end], w.signer.header[gone:at])
			gone += end - at
		}
		at = end
	}
	w.signer.header = w.signer.header[gone:]
	c := &w.tx.Content
	if c.Bytes != nil {
		c.Bytes = c.Bytes[gone:]
		return
	}
	c.Reader = &shortened{header: w.signer.header, rest: c.Reader, gone: int64(gone)}
	c.Length -= int64(gone)
}

// shortened is a stored message whose header section lost some octets.
type shortened struct {
	header []byte // what is left of it
	rest   io.ReaderAt
	gone   int64
}

// ReadAt implements io.ReaderAt.
func (s *shortened) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	if off < int64(len(s.header)) {
		if n = copy(p, s.header[off:]); n == len(p) {
			return n, nil
		}
	}
	m, err := s.rest.ReadAt(p[n:], off+int64(n)+s.gone)
	return n + m, err
}

// token is the signed token that names the message, or the recipient where mail
// goes one recipient at a time.
func (w *worker) token(work *queue.Work, dir *policy.Directory) (string, error) {
	env := work.Env
	index := sign.NoRecipient
	if len(work.Recipients) == 1 && singleRecipient(dir, work.Key.Stream, work.Key.Kind) {
		index = int(work.Recipients[0].Index)
	}
	days := dir.Document().Inbound.ReturnPathDays
	return sign.EncodeReturnPath(dir.ReturnPathKeys(), env.ID, index, env.AcceptedAt.AddDate(0, 0, days))
}

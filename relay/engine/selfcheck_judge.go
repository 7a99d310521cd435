package engine

import (
	"context"
	"time"

	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// signerOf returns the signer of a sending domain; nil if it signs nothing.
func (e *Engine) signerOf(domain mailaddr.Domain) *sign.Signer {
	dir := e.cfg.Directory()
	if dir == nil || !dir.Document().Delivery.SignDKIM {
		return nil
	}
	d, ok := dir.DomainFor(domain)
	if !ok || d.Name != domain || len(d.DKIM) == 0 {
		return nil
	}
	signer, err := e.signers.Signer(d)
	if err != nil {
		return nil // its mail does not go out either, and says so
	}
	return signer
}

// standIn signs a message that was never sent.
func (s *sample) standIn(now time.Time) ([]byte, error) {
	fields := s.fields
	if fields == nil {
		d := string(s.signer.Domain())
		fields = []byte("From: <postmaster@" + d + ">\r\nTo: <postmaster@" + d + ">\r\nSubject: DKIM\r\nDate: " + now.UTC().Format(time.RFC1123Z) + "\r\n\r\n")
	}
	body := "DKIM\r\n"
	h := sign.NewBodyHasher()
	if _, err := h.Write([]byte(body)); err != nil {
		return nil, err
	}
	signed, err := s.signer.Sign(nil, nil, fields, h.Sum(), s.want, now)
	if err != nil {
		return nil, err
	}
	return append(append(signed, fields...), body...), nil
}

// judge verifies a message with what DNS shows: what the first name server says
// that answers, or all of them. What one good answer proves, others that are bad
// do not disprove: they are out of date, or wrong.
func (c *selfCheck) judge(ctx context.Context, s *sample) sign.Judgement {
	if s.message == nil {
		var err error
		if s.message, err = s.standIn(c.engine.cfg.Now()); err != nil {
			return sign.Judgement{Verdict: sign.CheckUnknown}
		}
	}
	resolver := c.engine.cfg.Resolver
	if !s.all {
		return sign.Judge(s.signer.Check(s.message, s.want, func(name string) sign.KeyRecord {
			return keyRecord(resolver.Text(ctx, name))
		}), s.signer.AlgorithmOf)
	}
	asked := make(map[string][]resolve.Text)
	servers := 1
	worst := sign.Judgement{Verdict: sign.CheckUnknown}
	for i := 0; i < servers; i++ {
		j := sign.Judge(s.signer.Check(s.message, s.want, func(name string) sign.KeyRecord {
			texts, ok := asked[name]
			if !ok {
				texts = resolver.TextEverywhere(ctx, name)
				asked[name], servers = texts, len(texts)
			}
			return keyRecord(texts[i])
		}), s.signer.AlgorithmOf)
		switch {
		case j.Verdict == sign.CheckGood:
			return j
		case j.Verdict == sign.CheckBad && worst.Verdict != sign.CheckBad:
			worst = j
		}
	}
	return worst
}

func keyRecord(t resolve.Text) sign.KeyRecord {
	return sign.KeyRecord{Records: t.Records, Missing: t.Missing, TTL: t.TTL, Err: t.Err}
}

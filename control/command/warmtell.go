package command

import (
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/warmup"
)

// Tally returns the counts.
func (i *WarmTold) Tally() warmup.Tally {
	return warmup.Tally{Attempts: int64(i.GetAttempts()), Accepted: int64(i.GetAccepted()), Deferred: int64(i.GetDeferred()),
		Blocked: int64(i.GetBlocked()), Hard: int64(i.GetHard()), Signatures: int64(i.GetSignatures())}
}

// Validate implements Command.
func (c *WarmTell) Validate() error {
	if n := len(c.GetItems()); n < 1 || n > MaxWarmItems {
		return fault.Field(opValidate, "items", "%d are out of range, allowed are 1 to %d", n, MaxWarmItems)
	}
	for _, i := range c.GetItems() {
		if err := CheckWarmTold(i); err != nil {
			return err
		}
	}
	return checkMeta(c.GetMeta())
}

// CheckWarmTold checks the form of one item.
func CheckWarmTold(i *WarmTold) error {
	tally := i.Tally()
	switch {
	case i.GetClass() >= warmup.MaxClasses || i.GetDay() < 0 || i.GetDay() > maxDay:
		return fault.Field(opValidate, "items", "the class or day of one is out of range")
	case i.GetAttempts() == 0 || !tally.Sound():
		return fault.Field(opValidate, "items", "the counts %+v of one cannot be of one day", tally)
	}
	return checkBytes("node", i.GetNode(), 16, 16)
}

"""Write the numbers and the Croissant metadata of data_cards/ anew: python bench/cards.py. BoigBench, Stock and the preferences are built by their users, so their cards are filled beside them."""
from boig.benches.cards import write_card, write_croissant
from boig.benches.market import make_stock, make_tweets
from boig.benches.subjects import card_facts
from boig.core import project_root
from boig.data.emoji import load_emojibench
from boig.zoo import resolve

if __name__ == "__main__":
    write_card("emojibench", load_emojibench())
    write_card("pocket-ads", (make_tweets(), make_stock()))
    write_card("pocket-subjects", card_facts())
    for card in sorted((project_root()/"data_cards").glob("*.md")):
        write_croissant(card.stem, card.with_suffix(".croissant.json"), resolve("emojibench") if card.stem == "emojibench" else None)
